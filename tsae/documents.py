"""From files, saved data sets and the hub to documents.

A document is a text, or the token ids of a data set that is tokenized already.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import IO, Any

from tsae.language_model import hub_name

EXPECTED = ".txt, .jsonl or .parquet"  # .json and .gz are read too
IDS, MASK = "input_ids", "attention_mask"  # columns of text that is tokenized already
NETWORK = {
    "aiohttp",
    "fsspec",
    "httpcore",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "urllib3",
}

# (Where the row stands, the row). Lines and elements count from 1, rows of tables from 0.
Rows = Iterator[tuple[str, Any]]


class TokenIds(list):
    """Token ids of one document, and where they were read.

    `padded` is False where an attention mask has told the padding.
    """

    def __init__(self, ids: Iterable[int], place: str, padded: bool = True) -> None:
        super().__init__(ids)
        self.place, self.padded = place, padded


Document = str | Sequence[int]


# -- readers: from a file and the name of its text column to rows --


def open_file(path: Path, mode: str, **options) -> IO:
    """A file, decompressed where its name ends in .gz."""
    return (gzip.open if path.suffix.lower() == ".gz" else open)(path, mode, **options)


def paragraph_rows(path: Path, text_column: str) -> Rows:
    """Paragraphs of a text file, which an empty line ends."""
    paragraph, number = [], 0
    with open_file(path, "rt", encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line == "\n" and paragraph:
                yield f"{path}, line {number}", {text_column: "".join(paragraph)[:-1]}
                paragraph = []
            else:
                paragraph.append(line)
    yield f"{path}, line {number}", {text_column: "".join(paragraph)}


def json_rows(path: Path, text_column: str) -> Rows:
    """Values of a JSON file: one per line, or the elements of one array."""
    with open_file(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        file.seek(0)
        yield from json_array(path, file) if first == "[" else json_lines(path, file)


def json_lines(path: Path, file: IO[str]) -> Rows:
    """The value of every line that is not blank."""
    for number, line in enumerate(file, 1):
        place = f"{path}, line {number}"
        if not line.isspace():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise not_json(place, error) from None
            yield place, value


def json_array(path: Path, file: IO[str]) -> Rows:
    """The elements of an array; the whole file is in memory."""
    try:
        elements = json.load(file)
    except (ValueError, RecursionError) as error:
        raise not_json(f"{path}, line {getattr(error, 'lineno', 1)}", error) from None
    for number, value in enumerate(elements, 1):
        yield f"{path}, element {number}", value


def not_json(place: str, error: Exception | str) -> ValueError:
    reason = getattr(error, "msg", error)
    return ValueError(
        f"{place} is not JSON ({reason}): expected one object per line, or one array of objects"
    )


def parquet_rows(path: Path, text_column: str) -> Rows:
    """Rows of a parquet file, with the columns that are needed."""
    from pyarrow.parquet import ParquetFile

    if path.stat().st_size == 0:
        return
    with ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:  # not a group at once
        columns = needed_columns(file.schema_arrow.names, text_column)
        # A batch across groups would lose what stands before a damaged one.
        groups = ([number] for number in range(file.num_row_groups))
        batches = (file.iter_batches(1024, group, columns) for group in groups)
        yield from arrow_rows(path, chain.from_iterable(batches))


def needed_columns(names: list[str], text_column: str) -> list[str]:
    """The text column, or those of tokenized text; all where there is neither."""
    if text_column in names:
        return [text_column]
    return [name for name in names if name in (IDS, MASK)] if IDS in names else names


def arrow_rows(path: Path, batches: Iterable) -> Rows:
    """Rows of pyarrow's record batches, counted from 0. Raises ValueError for broken text."""
    number = 0
    for batch in batches:
        for row in range(batch.num_rows):
            place = f"{path}, row {number}"
            try:
                columns = zip(batch.schema.names, batch.columns, strict=True)
                yield place, {name: column[row].as_py() for name, column in columns}
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place} is not UTF-8 ({error.reason}): write the file again as UTF-8"
                ) from None
            number += 1


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".txt": paragraph_rows,
    ".jsonl": json_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
}


def reader_of(path: Path) -> Callable[[Path, str], Rows] | None:
    """The reader that a file's name asks for: a.txt.gz is text, other .gz is JSON."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return READERS.get(Path(path.stem).suffix.lower(), json_rows)
    return READERS.get(suffix)


# -- sources: a file, a folder, a saved data set, the hub --


def local_path(source: str | Path) -> Path:
    """The path with ~ for the home folder."""
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # ~someone
        raise FileNotFoundError(f"no corpus at {source}: {error}") from None


def is_saved_data_set(path: Path) -> bool:
    """Whether datasets' save_to_disk wrote this folder."""
    names = {file.name for file in path.iterdir()} if path.is_dir() else set()
    return "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names


def local_files(source: str | Path) -> list[Path]:
    """Files of a local corpus, hidden ones left out; none for the name of a hub data set.

    Raises ValueError for files of another kind or of several kinds, FileNotFoundError for a path
    where nothing is.
    """
    path = local_path(source)
    if path.is_dir():
        entries = path.rglob("*") if is_saved_data_set(path) else path.iterdir()
        files = sorted(f for f in entries if not (f.name.startswith(".") or f.is_dir()))
        return files if is_saved_data_set(path) else files_of_one_kind(path, files)
    if path.exists():
        if reader_of(path) is None:
            raise ValueError(f"cannot read {path}: expected a {EXPECTED} file, by its name")
        return [path]
    name = hub_name(source)[0].partition(":")[0]
    if path.is_absolute() or reader_of(path) or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(
            f"no corpus at {path}: expected a {EXPECTED} file, a folder of them, or a hub id"
        )
    return []


def files_of_one_kind(folder: Path, files: list[Path]) -> list[Path]:
    """Those files that have a reader. Raises ValueError for none, and for several readers."""
    by_reader: dict[Callable, list[Path]] = {}
    for file in files:
        if reader := reader_of(file):
            by_reader.setdefault(reader, []).append(file)
    if not by_reader:
        raise ValueError(f"no text in {folder}: expected {EXPECTED} files, not in folders below it")
    if len(by_reader) > 1:
        names = " and ".join(group[0].name for group in by_reader.values())
        raise ValueError(
            f"{folder} holds files of several kinds, {names}: expected text of one kind, so move "
            "the others or name one file"
        )
    return next(iter(by_reader.values()))


def file_rows(path: Path, text_column: str) -> Rows:
    """Rows of one file. Raises ValueError with the place for a file that is damaged."""
    from pyarrow import ArrowException

    after = ""
    try:
        for place, row in reader_of(path)(path, text_column):
            yield place, row
            after = f" after{place.removeprefix(str(path)).replace(',', '')}"
    except UnicodeDecodeError:
        raise ValueError(
            f"{path}, line {undecodable_line(path)} is not UTF-8: save the file as UTF-8"
        ) from None
    except (ArrowException, EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # no permission, for one, which is no damage
        kind = "gzip" if path.suffix.lower() == ".gz" else path.suffix.lower()[1:]
        raise ValueError(
            f"{path} is damaged or cut short{after} ({error}): expected a whole {kind} file, so "
            "fetch it again"
        ) from error


def undecodable_line(path: Path) -> int:
    """Number of the first line that is not UTF-8."""
    with open_file(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise ValueError(f"{path} changed while it was read: read it again")


def saved_rows(path: Path, text_column: str) -> Rows:
    """Rows of what save_to_disk wrote. Raises ValueError for damage and for no split "train"."""
    from datasets import load_from_disk
    from pyarrow import ArrowException

    try:
        data = load_from_disk(str(path))
    except (ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): expected a folder that save_to_disk wrote"
        ) from error
    if isinstance(data, dict):
        if "train" not in data:
            raise ValueError(
                f"{path} holds the splits {', '.join(sorted(data))}: expected 'train', so name the "
                "folder of one split"
            )
        data = data["train"]
    columns = needed_columns(data.column_names, text_column)
    tables = data.with_format("arrow").select_columns(columns).iter(1024)
    yield from arrow_rows(path, chain.from_iterable(table.to_batches() for table in tables))


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error is of the operating system or of a library for networks."""
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or not packages.isdisjoint(NETWORK)


def hub_rows(source: str | Path) -> Rows:
    """Rows of the split "train" of a hub data set, streamed.

    Raises FileNotFoundError where the hub gives nothing, ConnectionError where it stops.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    name, revision = hub_name(source)
    name, _, configuration = name.partition(":")
    options = {"name": configuration or None, "revision": revision}
    number = 0
    try:
        for row in load_dataset(name, split="train", streaming=True, **options):
            yield f"{source}, row {number}", row
            number += 1
    except StopIteration:  # how datasets answers an empty JSON file
        return
    except Exception as error:
        if number and is_broken_connection(error):
            raise ConnectionError(
                f"{source} broke off after {number:,} rows: check the network and start again "
                f"({error})"
            ) from error
        if is_broken_connection(error):
            raise FileNotFoundError(
                f"the data set {str(source)!r} is neither a local file nor one the hub gave: check "
                f"the name and the network, or give a local copy ({error})"
            ) from error
        if isinstance(error, ValueError | RuntimeError | DatasetGenerationError):
            raise ValueError(
                f"cannot read {source}: expected a hub data set with a split 'train' ({error})"
            ) from error
        raise


# -- documents --


def read_documents(source: str | Path, text_column: str = "text") -> Iterator[Document]:
    """Documents of a local file, of a folder of files, or of a hub data set.

    Local files are .txt (a document per paragraph), .jsonl, .json or .parquet, the first three also
    compressed (.gz). A folder holds files of one kind, or is what datasets' save_to_disk wrote. A
    hub data set is "name" or "name:configuration", either with "@revision"; its split "train" is
    streamed. A path that exists is never taken for a hub name.

    Blank texts are skipped. Without the text column, a column `input_ids` gives token ids, and
    `attention_mask` tells their padding. Raises FileNotFoundError, ValueError or, where a stream
    breaks off, ConnectionError with what was expected.
    """
    # Without this even reading a local data set is reported to the hub.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    path = local_path(source)
    if is_saved_data_set(path):
        rows = saved_rows(path, text_column)
    elif files := local_files(source):
        rows = chain.from_iterable(file_rows(file, text_column) for file in files)
    else:
        rows = hub_rows(source)
    for place, row in rows:
        if document := to_document(place, row, text_column):
            yield document


def to_document(place: str, row: Any, text_column: str) -> Document:
    """Text or token ids of a row, empty for a blank one. Raises ValueError with the place."""
    if isinstance(row, str):
        row = {text_column: row}
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {described(row)}: expected an object with {text_column!r}")
    if text_column not in row:
        if IDS in row:
            return to_token_ids(place, row)
        raise ValueError(
            f"{place} has no text under {text_column!r} and no {IDS!r}; "
            f"its columns are {sorted(row)}"
        )
    text = row[text_column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"{place} holds {described(text)} under {text_column!r}: expected text, so convert the "
            "column or choose another"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds half a surrogate pair at character {error.start}: expected Unicode "
            "text, so mend or remove the row"
        ) from None
    return text if text.strip() else ""


def to_token_ids(place: str, row: dict[str, Any]) -> TokenIds:
    """Ids of a row without what its attention mask hides. Raises ValueError for other values."""
    ids, mask = row[IDS], row.get(MASK)
    for name, values in ((IDS, ids), (MASK, mask)):
        if values is None:
            continue
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise ValueError(
                f"{place} holds {described(values)} under {name!r}: expected one list of whole "
                "numbers per row"
            )
    if ids is None or mask is None:
        return TokenIds(ids or [], place)
    if len(ids) != len(mask):
        raise ValueError(
            f"{place} holds {len(ids)} ids and an attention mask of {len(mask)}: expected as many"
        )
    return TokenIds(compress(ids, mask), place, padded=False)


def described(value: Any) -> str:
    """A value in words, for an error."""
    words = {bool: "a truth value", int: "a number", float: "a number", list: "a list"}
    words |= {dict: "an object", type(None): "null"}
    return f"{words.get(type(value), f'a {type(value).__name__}')} ({str(value)[:40]})"
