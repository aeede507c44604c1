"""Text in every form that people keep it in: documents come back whole, or one sentence says why.

Readers are compared with plain json, pyarrow and datasets, token rows with one document at a time.
"""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from copy import copy
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lab import Lab
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PythonBackend

import tsae_utils as tu
from conftest import MODELS, ROOT, word_tokenizer
from tsae.documents import local_files
from tsae.text import PlainText

# One file per test function is written again and again.
OFTEN = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ODD = ["\n", "\r\n", "\r", "\0", "\u2028", "\u2029", "\x85", "\x0b", "\ufeff", " ", "\t", "\n\n"]
NAMES = ["<|endoftext|>", "</s>", "<s>", "<unk>", "<|endof", "text|>"]
PARTS = st.one_of(
    st.sampled_from(ODD + NAMES), st.text(max_size=6), st.sampled_from("w2 w3".split())
)
TEXTS = st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=12)


def raises(kind, message):
    return pytest.raises(kind, match=message)


def read(source, **options) -> list:
    return list(tu.read_documents(source, **options))


def write_jsonl(path: Path, rows: list) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def write_parquet(path: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def not_blank(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


# -- every format gives the documents back --


def dumped(texts: list[str], form: str) -> str:
    rows = [{"id": i, "text": text, "more": {"text": [text]}} for i, text in enumerate(texts)]
    if form == "lines":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if form == "plain lines":  # all characters as they are, blank lines, no line break at the end
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        return "\ufeff\n" + "\r\n \n".join(lines)
    return json.dumps(rows, ensure_ascii=form == "array", indent=None if form == "array" else 2)


@OFTEN
@given(texts=TEXTS, form=st.sampled_from(["lines", "plain lines", "array", "indented array"]))
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.gz", "A.JSON"])
def test_json_gives_the_documents_back(tmp_path, texts, form, name):
    content = dumped(texts, form).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == not_blank(texts)


@OFTEN
@given(texts=TEXTS, size=st.integers(1, 5))
def test_parquet_gives_the_documents_back(tmp_path, texts, size):
    table = pa.table({"id": list(range(len(texts))), "text": pa.array(texts, pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=size)
    assert read(tmp_path / "a.parquet") == not_blank(texts)


@OFTEN
@given(texts=TEXTS, between=st.sampled_from(["\n\n", "\r\n\r\n", "\r\r", "\n\n\n", "\n \n"]))
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_paragraphs_are_documents(tmp_path, texts, between, name):
    content = between.join(texts)
    encoded = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith("gz") else encoded)
    lines = content.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert read(tmp_path / name) == not_blank(lines.split("\n\n"))


def test_paragraphs_are_those_of_datasets(tmp_path):
    """The reader of datasets, which ours replaces, gave these documents."""
    pieces = ["one", "two\nlines", " \n", "", "\nleading", "trailing\n", "x\u2028y\x85z\0", "\r\n"]
    content = "\n\n".join(pieces) + "\n\n\n\n" + "\r\n\r\n".join(pieces)
    (tmp_path / "a.txt").write_bytes(content.encode())
    data = load_dataset(
        "text",
        data_files=str(tmp_path / "a.txt"),
        sample_by="paragraph",
        split="train",
        streaming=True,
    )
    assert read(tmp_path / "a.txt") == not_blank([row["text"] for row in data])


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.jsonl.gz"])
def test_a_large_file_is_not_held_in_memory(tmp_path, name):
    """30 MB of text; only what is read at one time is in Python's memory."""
    text, n = "All work and no play makes a dull boy. " * 75, 10_000
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, {"text": [text] * n})
    elif name.endswith("txt"):
        path.write_text(f"{text}\n\n" * n)
    else:
        content = (f"{json.dumps({'text': text})}\n" * n).encode()
        path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    tracemalloc.start()
    try:
        assert sum(1 for _ in tu.read_documents(path)) == n
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


# -- paths --


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The folder that ~ names, where we are."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["c4 [en]", "what?", "a*b", "x@main", "en:1", "{a,b}", "~t"])
@pytest.mark.parametrize("kind", ["jsonl", "saved"])
def test_a_path_is_no_pattern(home, name, kind):
    folder = home / name
    if kind == "saved":
        Dataset.from_dict({"text": ["hello"]}).save_to_disk(folder)
    else:
        folder.mkdir()
        write_jsonl(folder / "part.jsonl", [{"text": "hello"}])
        assert read(folder / "part.jsonl") == ["hello"]
    assert read(folder) == ["hello"]
    if not name.startswith("~"):  # which is a home folder, in a relative path
        assert read(name) == ["hello"]


def test_the_home_folder(home):
    write_jsonl(home / "a.jsonl", [{"text": "hello"}])
    assert read("~/a.jsonl") == read(Path("~/a.jsonl")) == ["hello"]
    with raises(FileNotFoundError, "no corpus at .*/gone: expected a .txt"):
        read("~/gone")
    with raises(FileNotFoundError, "no corpus at ~nobody-of-this-name/a"):
        read("~nobody-of-this-name/a")


def test_a_path_wins_over_a_hub_name(home):
    (home / "allenai/c4").mkdir(parents=True)
    write_jsonl(home / "allenai/c4/a.jsonl", [{"text": "local"}])
    assert read("allenai/c4") == ["local"]
    with raises(FileNotFoundError, "no corpus at data/of/mine"):
        read("data/of/mine")  # hub names have one slash


def test_hidden_files_are_no_text(home):
    folder = home / "text"
    (folder / ".cache").mkdir(parents=True)
    for name in (".DS_Store", "._a.jsonl", ".hidden.txt", ".cache/b.jsonl"):
        (folder / name).write_bytes(b"\0\1\xff")
    write_jsonl(folder / "a.jsonl", [{"text": "hello"}])
    (folder / "README.md").write_text("what this is")
    (folder / "empty.jsonl").touch()
    (folder / "folder.jsonl").mkdir()
    assert read(folder) == ["hello"]


def test_a_folder_of_several_kinds(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"text": "hello"}])
    write_jsonl(tmp_path / "more.json.gz", [{"text": "again"}])
    assert read(tmp_path) == ["hello", "again"], "one kind under several names"
    (tmp_path / "LICENSE.txt").write_text("MIT")
    message = "holds files of several kinds, LICENSE.txt and data.jsonl: expected text of one kind"
    with raises(ValueError, message):
        read(tmp_path)


def test_compressed_kinds(tmp_path):
    """What is inside a .gz follows from the suffix before it."""
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b'{"text": 1}\n\nb', mtime=0))
    assert read(tmp_path / "a.txt.gz") == ['{"text": 1}', "b"]
    write_jsonl(tmp_path / "c.v1.gz", [{"text": "c"}])
    assert read(tmp_path / "c.v1.gz") == ["c"]
    with raises(ValueError, "several kinds, a.txt.gz and c.v1.gz"):
        read(tmp_path)


def test_empty_files(tmp_path):
    for name in ("a.txt", "a.txt.gz", "a.jsonl", "a.gz", "a.json", "a.parquet"):
        (tmp_path / name).touch()
        assert read(tmp_path / name) == []
    (tmp_path / "a.json").write_text(" [ ] \n")
    assert read(tmp_path / "a.json") == []


# -- columns --


def test_missing_and_blank_texts_are_skipped(tmp_path):
    texts = [None, "a", "", " \n\t\u2003", "b", None]
    expected = ["a", "b"]
    assert read(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])) == expected
    assert read(write_parquet(tmp_path / "a.parquet", {"text": texts})) == expected
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == expected
    (tmp_path / "b.json").write_text(json.dumps(["a", "", "b"]))
    assert read(tmp_path / "b.json") == expected, "an array of texts"
    assert read(write_jsonl(tmp_path / "c.jsonl", ["a", "b"])) == expected


@pytest.mark.parametrize("value", [1, 2.5, True, ["a"], {"a": "b"}], ids=str)
def test_a_column_of_other_values(tmp_path, value):
    kind = {bool: "a truth value", list: "a list", dict: "an object"}.get(type(value), "a number")
    message = rf" holds {kind} \(.*\) under 'text': expected text, so convert the column"
    rows = [{"text": "fine"}, {"text": value}]
    with raises(ValueError, rf"a.jsonl, line 2{message}"):
        read(write_jsonl(tmp_path / "a.jsonl", rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with raises(ValueError, rf"a.json, element 2{message}"):
        read(tmp_path / "a.json")
    with raises(ValueError, rf"a.parquet, row 0{message}"):
        read(write_parquet(tmp_path / "a.parquet", {"text": [value]}))


def test_columns_that_only_a_table_has(tmp_path):
    for value, kind in ((date(2026, 1, 1), "a date"), (b"bytes", "a bytes")):
        with raises(ValueError, rf"a.parquet, row 1 holds {kind} \(.*\) under 'text'"):
            read(write_parquet(tmp_path / "a.parquet", {"text": [None, value]}))
    categories = pa.array(["a", "b", "a"]).dictionary_encode()
    assert read(write_parquet(tmp_path / "b.parquet", {"text": categories})) == ["a", "b", "a"]
    large = pa.array(["a"], pa.large_string())
    assert read(write_parquet(tmp_path / "c.parquet", {"text": large})) == ["a"]


def test_another_text_column(tmp_path):
    rows = [{"text": "x", "body": "y"}]
    assert read(write_jsonl(tmp_path / "a.jsonl", rows), text_column="body") == ["y"]
    columns = {"text": ["x"], "my body": ["y"]}
    assert read(write_parquet(tmp_path / "a.parquet", columns), text_column="my body") == ["y"]
    (tmp_path / "a.txt").write_text("z")
    assert read(tmp_path / "a.txt", text_column="body") == ["z"]
    message = r"a.parquet, row 0 has no text under 'gone' .*columns are \['my body', 'text'\]"
    with raises(ValueError, message):
        read(tmp_path / "a.parquet", text_column="gone")


# -- damage --


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"line 3 is not JSON \(Expecting ','"),
        ("a.jsonl", b'[{"text": 1', r"line 1 is not JSON"),
        ("a.jsonl", b'\n{\n"text": "a"\n}\n', "line 2 is not JSON .* one object per line"),
        ("a.jsonl", b'{"text": "a"}\nnull\n', r"line 2 is null \(None\): expected an object"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"line 2 is a list \(\[1\]\): expected an object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1 holds half a surrogate pair at character 0"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON .*recursion"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON .*recursion"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1 is not JSON .*limit"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', "line 1 is not JSON .*Expecting ','"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "line 1 is not JSON .*Expecting ','"),
        ("a.json", b'[{"text": "a"}, {"text": "b]', "line 1 is not JSON .*Unterminated"),
        ("a.json", b'[{"text": "a"},]', "line 1 is not JSON"),
        ("a.json", b'[{"text": "a"}] 1', "is not JSON .Extra data"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"line 1 has no text .*columns are \['data'\]"),
        ("a.json", b'{"text": ["a", "b"]}', r"line 1 holds a list \(.*\) under 'text'"),
        ("a.json", b'[{"text": "a"}, "b", 3]', r"element 3 is a number \(3\): expected an object"),
        (
            "a.txt",
            b"fine\n" * 5000 + b"caf\xe9\n",
            "line 5001 is not UTF-8: save the file as UTF-8",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ("a.json", '["a"]'.encode("utf-16"), "line 1 is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"fine\ncaf\xe9", mtime=0), "line 2 is not UTF-8"),
        ("a.txt.gz", b"plain text", r"is damaged or cut short \(Not a gzipped file.*whole gzip"),
        ("a.parquet", b"PAR1" + b"x" * 50 + b"PAR1", "expected a whole parquet file, so fetch"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with raises(ValueError, f"{name}.*{message}"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.parquet"])
def test_a_file_that_is_cut_short(tmp_path, name):
    """What stands before the cut is read; then one sentence says where it was."""
    generator = torch.Generator().manual_seed(0)
    texts = [str(torch.rand(50, generator=generator).tolist()) for _ in range(500)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": texts}), path, row_group_size=100)
        whole = bytearray(path.read_bytes())
        whole[len(whole) // 2 : len(whole) // 2 + 20_000] = bytes(20_000)  # the end is its index
        path.write_bytes(whole)
    else:
        row = '{"text": "%s"}\n' if "json" in name else "%s\n\n"
        whole = gzip.compress("".join(row % text for text in texts).encode())
        path.write_bytes(whole[: len(whole) // 2])
    documents, kept = tu.read_documents(path), []
    kind = "row" if name.endswith("parquet") else "line"
    with raises(ValueError, rf"{name} is damaged or cut short after {kind} \d+ \(.*fetch it again"):
        kept.extend(documents)
    assert 50 < len(kept) < 450 and kept == texts[: len(kept)]


def test_a_parquet_text_that_is_not_utf_8(tmp_path):
    broken = pa.array([b"fine", b"caf\xe9"]).view(pa.string())
    with raises(ValueError, "a.parquet, row 1 is not UTF-8"):
        read(write_parquet(tmp_path / "a.parquet", {"text": broken}))


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    with raises(FileNotFoundError, "gone.txt|a.txt"):
        read(tmp_path)
    if os.geteuid():  # root reads everything
        (tmp_path / "a.txt").unlink()
        (tmp_path / "a.txt").write_text("secret")
        (tmp_path / "a.txt").chmod(0)
        with raises(PermissionError, "a.txt"):
            read(tmp_path)


# -- data sets that datasets saved --


def test_a_saved_data_set(tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    data = Dataset.from_dict({"id": list(range(3000)), "text": texts})
    data.save_to_disk(tmp_path / "one", num_shards=3)
    assert read(tmp_path / "one") == texts
    assert len([file for file in local_files(tmp_path / "one") if file.suffix == ".arrow"]) == 3
    DatasetDict({"test": data.select([0]), "train": data}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == texts
    DatasetDict({"test": data, "dev": data}).save_to_disk(tmp_path / "none")
    with raises(
        ValueError, "none holds the splits dev, test: expected 'train', so name the folder"
    ):
        read(tmp_path / "none")
    assert read(tmp_path / "none" / "test") == texts
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with raises(ValueError, r"one is damaged .*expected a folder that save_to_disk wrote"):
        read(tmp_path / "one")


def test_a_saved_data_set_with_a_format_of_its_own(tmp_path):
    """The format that set_format chose is stored and would hide the text."""
    data = Dataset.from_dict({"n": [1, 2, 3], "text": ["a", "b", "c"]}).select([2, 0])
    data.set_format("torch", columns=["n"])
    data.save_to_disk(tmp_path / "d")
    assert read(tmp_path / "d") == ["c", "a"]


# -- text that is tokenized already --


def save_tokenized(folder: Path, kind: str, columns: dict) -> Path:
    if kind == "saved":
        Dataset.from_dict(columns).save_to_disk(folder / "saved")
        return folder / "saved"
    if kind == "parquet":
        return write_parquet(folder / "a.parquet", columns)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return write_jsonl(folder / "a.jsonl", rows)


KINDS = ("jsonl", "parquet", "saved")


@pytest.mark.parametrize("kind", KINDS)
def test_tokenized_text_gives_the_rows_of_its_text(tmp_path, kind, lm, texts):
    """With BOS, with a separator, with both or neither: rows are those of the text."""
    ids = [[int(word[1:]) for word in text.split()] for text in texts]
    ends = [([], []), ([0], []), ([], [1]), ([0], [1])]
    written = [[*ends[i % 4][0], *row, *ends[i % 4][1]] for i, row in enumerate(ids)]
    source = save_tokenized(tmp_path, kind, {"input_ids": written})
    rows = tu.token_rows(tu.read_documents(source), lm, 16)
    assert torch.equal(rows, tu.token_rows(texts, lm, 16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 1, 63, 99])
def test_an_attention_mask_tells_padding(tmp_path, kind, side, pad, lm, texts):
    """Padding may be any token then: one beyond the embedding, or one that ends the text, too."""
    padding_lm = copy(lm)
    padding_lm.pad_id = 63
    columns = {"input_ids": [], "attention_mask": []}
    for text in texts:
        row = [0, *(int(word[1:]) for word in text.split()), 63]
        padding, mask = [pad] * (42 - len(row)), [1] * len(row)
        zeros = [0] * len(padding)
        pairs = (
            ((padding, row), (zeros, mask)) if side == "left" else ((row, padding), (mask, zeros))
        )
        for column, (first, second) in zip(columns.values(), pairs, strict=True):
            column.append([*first, *second])
    source = save_tokenized(tmp_path, kind, columns)
    rows = tu.token_rows(tu.read_documents(source), padding_lm, 16)
    assert torch.equal(rows, tu.token_rows([f"{text} w63" for text in texts], lm, 16))


PADDED = [  # (special tokens, ids as they are written, ids of the document)
    (
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "w2"},
        [0, 5, 2, 6, 2, 2],
        [5, 2, 6, 1],
    ),
    ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "w2"}, [2, 2, 0, 5, 1], [5, 1]),
    ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, [0, 5, 1, 1, 1], [5, 1]),
    ({"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}, [0, 0, 0, 5, 6], [5, 6, 0]),
    ({"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}, [0, 5, 0, 6, 0], [5, 0, 6, 0]),
    ({"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}, [0, 0], []),
    ({"eos_token": "</s>"}, [1, 5, 6], [5, 6, 1]),
    ({}, [0, 5, 6], [0, 5, 6, 0]),  # token 0 stands in for BOS, but it is text
    ({"bos_token": "<s>", "eos_token": "</s>"}, [0], []),
    ({"bos_token": "<s>", "eos_token": "</s>"}, [], []),
]


@pytest.mark.parametrize(("special", "written", "expected"), PADDED, ids=str)
def test_padding_bos_and_separator_of_a_row(tmp_path, special, written, expected):
    lm = tu.LanguageModel(MODELS["gpt2"](), word_tokenizer(**special), "m")
    source = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": ids} for ids in (written, [7, 8])])
    rows = tu.token_rows(tu.read_documents(source), lm, len(expected) + 4)
    assert rows.tolist() == [[lm.bos_id, *expected, 7, 8, lm.separator_id]]


@pytest.mark.parametrize("wrong", [-100, -1, 64, 2**40])
def test_ids_of_another_model(tmp_path, lm, wrong):
    source = write_jsonl(tmp_path / "a.jsonl", [{"input_ids": [2]}, {"input_ids": [3, wrong, 4]}])
    message = rf"a.jsonl, line 2 holds the token id {wrong}; those of .* are 0 to 63: was it"
    with raises(ValueError, message):
        tu.token_rows(tu.read_documents(source), lm, 2)
    with raises(ValueError, f"a document holds the token id {wrong}"):
        tu.token_rows([[2, wrong]], lm, 2)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": "a"}, r"holds a str \(a\) under 'input_ids': expected one list of whole"),
        ({"input_ids": [[1, 2]]}, r"holds a list \(\[\[1, 2\]\]\) under 'input_ids'"),
        ({"input_ids": [1, 2.5]}, r"holds a list \(\[1, 2.5\]\) under 'input_ids'"),
        ({"input_ids": [True]}, "under 'input_ids'"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "2 ids and an attention mask of 1"),
        ({"input_ids": [1], "attention_mask": ["1"]}, "under 'attention_mask'"),
    ],
    ids=str,
)
def test_columns_that_hold_no_ids(tmp_path, row, message):
    with raises(ValueError, f"a.jsonl, line 1 .*{message}"):
        read(write_jsonl(tmp_path / "a.jsonl", [row]))


def test_text_wins_over_ids(tmp_path):
    columns = {"text": ["a"], "input_ids": [[1, 2]]}
    for kind in KINDS:
        assert read(save_tokenized(tmp_path, kind, columns)) == ["a"]


# -- token rows --


def rows_by_hand(documents: list, lm, context_size: int, max_tokens: int) -> list[list[int]]:
    """One document at a time, with lists alone."""
    ids = []
    for document in documents:
        if isinstance(document, str):
            document = [int(word[1:]) if word[0] == "w" else 2 for word in document.split()]
        elif not document:
            continue
        ids += [*document, 1]
    ids, n = ids[:max_tokens], context_size - 1
    return [[0, *ids[i : i + n]] for i in range(0, len(ids) - n + 1, n)]


@OFTEN
@given(data=st.data())
def test_rows_are_those_of_one_document_at_a_time(lm, monkeypatch, data):
    word = st.sampled_from(["w2", "w9", "w63", "unknown", "</s>", "<s>"])
    ids = st.lists(st.integers(2, 63), max_size=9)
    document = st.one_of(st.lists(word, max_size=9).map(" ".join), ids)
    documents = data.draw(st.lists(document, min_size=1, max_size=20))
    context_size, limit = data.draw(st.integers(2, 9)), data.draw(st.integers(0, 60))
    monkeypatch.setattr("tsae.text.BATCH_DOCUMENTS", data.draw(st.integers(1, 5)))
    monkeypatch.setattr("tsae.text.BATCH_CHARACTERS", data.draw(st.integers(1, 50)))
    # "<s>" and "</s>" are two unknown words each: "<" and the rest.
    plain = [
        d.replace("<s>", "< s>").replace("</s>", "< /s>") if isinstance(d, str) else d
        for d in documents
    ]
    expected = rows_by_hand(plain, lm, context_size, limit)
    if expected:
        assert tu.token_rows(documents, lm, context_size, limit).tolist() == expected
    else:
        with raises(ValueError, "the corpus is empty or too small"):
            tu.token_rows(documents, lm, context_size, limit)


# -- special tokens that a text writes out --


class Letters(PythonBackend):
    """A slow tokenizer: one token per character, and added tokens."""

    def __init__(self, **special) -> None:
        self.letters = {chr(i): i for i in range(128)}
        super().__init__(**special)

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def get_vocab(self) -> dict[str, int]:
        return {**self.letters, **self.added_tokens_encoder}

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return chr(index)


def slow() -> Letters:
    tokenizer = Letters(eos_token="<|endoftext|>", bos_token="<s>", unk_token="\0")
    tokenizer.add_tokens(["    "])  # an ordinary added token, as GPT-NeoX has for spaces
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's model, whose vocabulary holds its special tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(chr(i) for i in range(33, 127)), "\u2581"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {
    "testbed": lambda: AutoTokenizer.from_pretrained(ROOT / "testbed" / "model"),
    "slow": slow,
    "unigram": unigram,
    "words": lambda: word_tokenizer(bos_token="<s>", eos_token="</s>"),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_ordinary_text_is_tokenized_as_before(tokenizer):
    texts = [
        "def f(x):\n        return  x",
        "a < b |> c",
        "</ s> <|endof text|>",
        "w2 w3 caf\u00e9",
    ]
    assert PlainText(tokenizer)(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


@OFTEN
@given(parts=st.lists(st.sampled_from([*NAMES, "<", "s>", "a", " ", "    ", "/"]), max_size=9))
def test_special_tokens_in_a_text_are_text(tokenizer, parts):
    text = "".join(parts)
    ids = PlainText(tokenizer)([text])[0]
    assert set(tokenizer.all_special_ids).isdisjoint(ids)


def test_a_document_that_names_the_separator_is_one_document():
    """GPT-2's name of it, with the testbed's tokenizer, which decodes to the same text."""
    tokenizer = TOKENIZERS["testbed"]()
    lm = tu.load_lm(ROOT / "testbed" / "model", device="cpu")
    text = "Documents end with <|endoftext|> in GPT-2's vocabulary."
    rows = tu.token_rows([text] * 50, lm, 8)
    assert int((rows[:, 1:] == lm.separator_id).sum()) <= 50
    assert tokenizer.decode(PlainText(tokenizer)([text])[0]) == text
    assert tokenizer(text)["input_ids"].count(lm.separator_id) == 1, "the tokenizer is as it was"


def test_a_special_token_is_tokenized_as_if_it_were_none():
    """The same merges as without special tokens, "</" among them, not those of two parts."""
    tokenizer = TOKENIZERS["testbed"]()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    without = Tokenizer.from_str(json.dumps({**state, "added_tokens": []}))
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    text = "<s>struck</s> out"
    ids = PlainText(tokenizer)([text])[0]
    assert ids == without.encode(text).ids
    assert tokenizer.convert_tokens_to_ids("</") in ids


def test_slow_tokenizers_keep_their_ordinary_added_tokens():
    tokenizer = slow()
    ids = PlainText(tokenizer)(["a    b<s>    c"])[0]
    space = tokenizer.convert_tokens_to_ids("    ")
    assert ids == [97, space, 98, *map(ord, "<s>"), space, 99]


# -- a text that breaks off --


def network_errors() -> list[BaseException]:
    import httpx
    import requests
    from huggingface_hub.errors import HTTPError

    kinds = (ConnectionError, TimeoutError, OSError, HTTPError, httpx.ReadError)
    return [kind("the line is dead") for kind in (*kinds, requests.exceptions.ChunkedEncodingError)]


def breaking_off(texts, error):
    yield from texts
    raise error


@pytest.mark.parametrize("error", network_errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("n", [3, 150])
def test_what_was_read_is_kept(tmp_path, lm, texts, error, n, monkeypatch, capsys):
    monkeypatch.setattr("tsae.text.BATCH_DOCUMENTS", 64)
    partial, read_so_far = tmp_path / "new" / "kept", tu.token_rows(texts[:n], lm, 16)
    with raises(
        ConnectionError, "broke off .the line is dead.; the .* kept in .*kept: resume=True"
    ):
        tu.token_rows(breaking_off(texts[:n], error), lm, 16, partial=partial)
    assert [file.name for file in partial.parent.iterdir()] == ["kept"]
    never = breaking_off([], AssertionError("more text was read"))
    for _ in range(2):  # it stays, as a run that is stopped later needs it again
        assert torch.equal(tu.token_rows(never, lm, 16, partial=partial, resume=True), read_so_far)
        assert "the corpus is the " in capsys.readouterr().out
    rows = tu.token_rows(texts, lm, 16, partial=partial)
    assert torch.equal(rows, tu.token_rows(texts, lm, 16)) and not partial.exists()
    assert torch.equal(tu.token_rows(texts, lm, 16, partial=partial, resume=True), rows)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_other_ends_keep_it_too(tmp_path, lm, texts, kind):
    partial = tmp_path / "kept"
    with raises(kind, "^stop") as caught:
        tu.token_rows(breaking_off(texts, kind("stop")), lm, 16, partial=partial)
    assert str(caught.value) == "stop" and "kept in" in caught.value.__notes__[0]
    kept = tu.token_rows([], lm, 16, partial=partial, resume=True)
    assert torch.equal(kept, tu.token_rows(texts, lm, 16))


def test_nothing_read_is_nothing_kept(tmp_path, lm):
    partial = tmp_path / "kept"
    with raises(FileNotFoundError, "^no such corpus$"):
        tu.token_rows(breaking_off([], FileNotFoundError("no such corpus")), lm, 8, partial=partial)
    assert not partial.exists()
    with raises(ValueError, "resume=True needs the file of an earlier reading: give partial"):
        tu.token_rows([], lm, 8, resume=True)


def test_enough_text_before_the_end_is_enough(tmp_path, lm, texts):
    """Tokens that suffice are used, also where the text broke off right behind them."""
    documents = breaking_off(texts, ConnectionError("later"))
    rows = tu.token_rows(documents, lm, 16, max_tokens=500, partial=tmp_path / "kept")
    assert torch.equal(rows, tu.token_rows(texts, lm, 16, max_tokens=500))


def test_kept_tokens_of_another_kind(tmp_path, lm, texts):
    partial = tmp_path / "kept"
    with raises(ConnectionError, "broke off"):
        tu.token_rows(breaking_off(texts, OSError("x")), lm, 16, partial=partial)
    vocabulary = {"<s>": 0, "</s>": 1, "x": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), bos_token="<s>"
    )
    other = tu.LanguageModel(lm.model, tokenizer, "m")
    with raises(ValueError, "kept are of another tokenizer than m's: delete the file to read"):
        tu.token_rows(texts, other, 16, partial=partial, resume=True)
    partial.write_bytes(b"damaged")
    with raises(ValueError, "kept holds no kept tokens .*: delete it to read the text from the"):
        tu.token_rows(texts, lm, 16, partial=partial, resume=True)


# -- the hub --


@pytest.fixture
def hub(monkeypatch):
    """A hub whose rows a test gives; errors among them are raised."""
    rows = []

    def stream():
        for row in rows:
            if isinstance(row, BaseException):
                raise row
            yield row

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: stream())
    return rows


def test_rows_of_the_hub(hub):
    hub += [{"text": "a"}, {"text": None}, {"text": " "}, {"text": "b"}, {"text": 7}]
    documents = tu.read_documents("owner/name:en@main")
    assert [next(documents), next(documents)] == ["a", "b"]
    with raises(ValueError, r"^owner/name:en@main, row 4 holds a number \(7\) under 'text'"):
        next(documents)
    hub[:] = [{"input_ids": [5, 6, 7], "attention_mask": [0, 1, 1]}]
    assert read("owner/name") == [[6, 7]]


@pytest.mark.parametrize("error", network_errors(), ids=lambda error: type(error).__name__)
def test_a_hub_that_breaks_off(hub, error):
    hub += [{"text": "a"}, error]
    with raises(ConnectionError, "owner/name broke off after 1 rows: check the network .*is dead"):
        read("owner/name")
    hub[:] = [error]
    with raises(FileNotFoundError, "'owner/name' is neither a local file nor one the hub gave"):
        read("owner/name")


def test_a_hub_data_set_without_the_split(hub):
    hub += [ValueError("Bad split: train. Available splits: ['test']")]
    with raises(ValueError, "cannot read owner/name: expected .* split 'train' .*Available splits"):
        read("owner/name")


def test_notebooks_keep_what_the_hub_gave(hub, tmp_path, gpt2_folder, texts, monkeypatch):
    """TSAE_RESUME_TEXT=1 takes what was kept; a whole reading is cached in its place."""
    places = {"MODEL": gpt2_folder, "CORPUS": "owner/name", "CACHE": tmp_path / "cache"}
    for name, place in places.items():
        monkeypatch.setenv(f"TSAE_{name}", str(place))
    monkeypatch.delenv("TSAE_RESUME_TEXT", raising=False)
    good = [{"text": text} for text in texts]
    hub += [*good[:100], ConnectionError("the line is dead")]
    lab = Lab("fig6_pareto", "smoke")
    with raises(ConnectionError, "split 'sae' of owner/name: .*TSAE_RESUME_TEXT=1 stands for"):
        lab.rows("sae", 1e6)
    monkeypatch.setenv("TSAE_RESUME_TEXT", "1")
    kept = lab.rows("sae", 1e6)
    hub[:] = good
    assert torch.equal(lab.rows("sae", 1e6), kept), "nothing more is read"
    monkeypatch.delenv("TSAE_RESUME_TEXT")
    every = lab.rows("sae", 1e6)
    assert len(every) > len(kept) and torch.equal(every[: len(kept)], kept)
    hub[:] = [ConnectionError("the line is dead")]
    assert torch.equal(lab.rows("sae", 1e6), every), "cached"
    assert not list((tmp_path / "cache").glob("text-*")), "and no longer kept beside it"


def test_the_notebooks_key_is_of_the_text_alone(tmp_path):
    from lab.data import corpus_key

    write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    before = corpus_key(str(tmp_path))
    (tmp_path / ".DS_Store").write_bytes(b"x")
    assert corpus_key(str(tmp_path)) == before
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    assert corpus_key(str(tmp_path)) != before
