"""Run the notebooks from the command line: all, or some by number, with progress on the terminal.

    python tools/run_notebooks.py                      # profile mini; writes figures/mini/
    python tools/run_notebooks.py 06 --profile smoke   # one notebook
    python tools/run_notebooks.py --redraw             # figures and claims from committed CSVs
    python tools/run_notebooks.py --redraw --keep      # the same, and keep the executed notebooks
    python tools/run_notebooks.py --record             # train, measure and keep, at profile record

An executed copy replaces its notebook only if it ran to its end.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
SOURCES = ("TSAE_MODEL", "TSAE_CORPUS", "TSAE_NGRAM_CORPUS", "TSAE_PUBLISHED")
OUTPUTS = ("TSAE_FIGURES", "TSAE_CACHE")


class Client(NotebookClient):
    """Runs a notebook and shows its printed lines and progress bars meanwhile."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            sys.stderr.write(msg["content"]["text"].replace("\n", "\n    "))
            sys.stderr.flush()
        return super().process_message(msg, cell, cell_index)


def select(numbers: list[str]) -> list[Path]:
    """Notebooks by number ("06" or "6"); those that the profile names, or all, by default.

    Raises SystemExit for an unknown number.
    """
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    numbers = numbers or notebooks_of_profile()
    chosen = []
    for number in numbers:
        prefix = f"{int(number):02d}_" if number.isdigit() else None
        matches = [path for path in every if prefix and path.name.startswith(prefix)]
        if not matches:
            known = ", ".join(path.name[:2] for path in every)
            raise SystemExit(f"no notebook number {number!r}: there are {known}")
        chosen += matches
    return chosen or every


def notebooks_of_profile() -> list[str]:
    """Numbers of the notebooks that the profile names; none where it runs all."""
    from notebooks.lab.profiles import PROFILES  # loads torch: not before it is needed

    profile = PROFILES.get(os.environ["TSAE_PROFILE"])
    return list(profile.notebooks) if profile else []


def with_fewer_colours(png: str) -> str:
    """The same picture (base64) with 256 colours, a third of the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256)
    smaller = io.BytesIO()
    picture.save(smaller, "png", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def strip(notebook: nbformat.NotebookNode) -> None:
    """Remove what belongs to this machine (folders, times, widgets) and make pictures small."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = with_fewer_colours(data["image/png"])
            for holder in (output, data):
                for key, value in list(holder.items()):
                    if isinstance(value, str) and not key.startswith("image/"):
                        holder[key] = without_machine_paths(value)


def without_machine_paths(text: str) -> str:
    """Text with this machine's folders replaced by their meaning, longest first."""
    names = {str(ROOT): "<repository>", str(Path.home()): "~", sys.prefix: "<environment>"}
    for place in sorted(names, key=len, reverse=True):
        if len(place) > 1:  # home may be "/"
            text = text.replace(place + "/", names[place] + "/")
    return re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", text)


def fill_answer(notebook: nbformat.NotebookNode, figure_id: str) -> None:
    """Write the notebook's takeaway into the cell at its top that is tagged `answer`."""
    path = figures_folder() / f"{figure_id}_takeaway.md"
    for cell in notebook.cells:
        if "answer" in cell.metadata.get("tags", []) and path.exists():
            cell.source = f"**Our answer.** {path.read_text(encoding='utf-8').strip()}"


def run(path: Path, keep: bool) -> float:
    """Execute one notebook in its own folder; returns the seconds it took."""
    notebook, started = nbformat.read(path, as_version=4), time.time()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    Client(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
        extra_arguments=["--log-level=40"],  # below errors the kernel only mentions TCP
    ).execute()
    if keep:
        strip(notebook)
        fill_answer(notebook, path.stem[3:])
        partial = path.with_suffix(".partial")
        nbformat.write(notebook, partial)
        partial.replace(path)
    return time.time() - started


def figures_folder() -> Path:
    """Where this run's figures go."""
    from notebooks.lab.profiles import settings  # loads torch: not before it is needed

    return settings(os.environ["TSAE_PROFILE"])[1]


def keep_times(seconds: dict[str, float]) -> None:
    """Update figures/<profile>/times.csv: seconds of each notebook's last run."""
    path = figures_folder() / "times.csv"
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    kept = dict(line.split(",") for line in lines)
    kept |= {name: f"{s:.0f}" for name, s in seconds.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{name},{kept[name]}\n" for name in sorted(kept))
    path.write_text("notebook,seconds\n" + rows)


def arguments() -> argparse.Namespace:
    """The command line, checked. Raises SystemExit with a sentence for settings that clash."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("numbers", nargs="*", help="notebook numbers; all by default")
    add("--profile", help="smoke, mini (default), record, smollm2-mini, gpt2-lite, gpt2 or pythia")
    add("--redraw", action="store_true", help="draw and judge from the CSVs (default: record)")
    add("--record", action="store_true", help="profile record, and keep the executed notebooks")
    add("--keep", action="store_true", help="with --redraw: keep the executed notebooks")
    args = parser.parse_args()
    keeps = args.record or args.keep
    if keeps and args.profile not in (None, "record"):
        option = "--record" if args.record else "--keep"
        raise SystemExit(
            f"{option} keeps notebooks executed at profile record: leave --profile out"
        )
    if args.keep and not args.redraw:
        raise SystemExit("--keep goes with --redraw; --record keeps notebooks by itself")
    if keeps and any(os.environ.get(name) for name in (*SOURCES, "TSAE_BUDGET", "TSAE_FIGURES")):
        raise SystemExit(
            f"--record is for the testbed: unset {', '.join(SOURCES)}, TSAE_BUDGET and TSAE_FIGURES"
        )
    return args


def prepare_environment(args: argparse.Namespace) -> None:
    """Pass the choices on to the kernels, with paths as the user meant them."""
    default = os.environ.get("TSAE_PROFILE") or "mini"
    if args.redraw or args.record:
        default = "record"
    os.environ["TSAE_PROFILE"] = args.profile or default
    os.environ["TSAE_TEXT_PROGRESS"] = "1"
    if args.redraw:
        os.environ["TSAE_REPLAY"] = "1"
    for name in (*SOURCES, *OUTPUTS):
        value = os.environ.get(name)
        if value and (name in OUTPUTS or Path(value).exists()):
            os.environ[name] = str(Path(value).resolve())


def explain(error: CellExecutionError | DeadKernelError) -> tuple[str, bool]:
    """(Text for the terminal, whether the error speaks for itself)."""
    if getattr(error, "ename", "") in {"ValueError", "FileNotFoundError"}:
        return error.evalue, True
    return re.sub(chr(27) + r"[^m]*m", "", str(error)), False


def main() -> None:
    args = arguments()
    prepare_environment(args)
    notebooks, failed, seconds, began = select(args.numbers), [], {}, time.time()
    if args.redraw and not args.numbers:  # only what has a CSV to draw from
        has_csv = {path.stem for path in figures_folder().glob("*.csv")} | {"scorecard"}
        notebooks = [path for path in notebooks if path.stem[3:] in has_csv]
    for i, path in enumerate(notebooks, 1):
        print(f"[{i}/{len(notebooks)}] {path.stem} ({os.environ['TSAE_PROFILE']})", flush=True)
        try:
            seconds[path.stem] = run(path, args.record or args.keep)
            print(f"\n    done in {seconds[path.stem]:.0f} s", flush=True)
        except (CellExecutionError, DeadKernelError) as error:
            failed.append(path.stem)
            text, speaks_for_itself = explain(error)
            print(f"\n    FAILED: {text}", file=sys.stderr, flush=True)
            if speaks_for_itself and i == 1:
                break  # a wrong profile, model or corpus fails every notebook alike
    took = time.time() - began
    print(f"{len(notebooks) - len(failed)} of {len(notebooks)} notebooks in {took:.0f} s")
    if seconds and not (args.redraw or args.record):  # a record's times say little: it resumes
        keep_times(seconds)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
