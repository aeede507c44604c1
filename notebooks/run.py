"""Run the notebooks from the command line: all, or some by number, with progress on the terminal.

    python notebooks/run.py                      # profile mini; writes figures/mini/
    python notebooks/run.py 06 --profile smoke   # one notebook
    python notebooks/run.py --redraw             # figures again from the committed CSVs, seconds
    python notebooks/run.py --record             # profile record; an executed copy replaces its notebook if it ended well
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

HERE = Path(__file__).resolve().parent
REDRAW_TAGS = {"bootstrap", "parameters", "figure"}


class Client(NotebookClient):
    """Runs a notebook and shows its printed lines and progress bars while it does."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            text = msg["content"]["text"].replace("\n", "\n    ")
            sys.stderr.write(text)
            sys.stderr.flush()
        return super().process_message(msg, cell, cell_index)


def chosen(numbers: list[str]) -> list[Path]:
    """Notebooks by number ("06" or "6"), all where none is given. Raises SystemExit for an unknown number."""
    every = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    found = []
    for number in numbers:
        match = [n for n in every if n.name.startswith(f"{int(number):02d}_")] if number.isdigit() else []
        if not match:
            raise SystemExit(f"no notebook number {number!r}: there are {', '.join(n.name[:2] for n in every)}")
        found += match
    return found or every


def fewer_colours(png: str) -> str:
    """The same picture (base64) with a palette of 256 colours: about a third of the size. A figure's own file keeps them all."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def strip(notebook: nbformat.NotebookNode) -> None:
    """Take out what belongs to the machine that ran it, its root and home folder, timings, widgets, and make pictures small."""
    notebook.metadata.pop("widgets", None)
    places = {str(HERE.parent): "<repository>", str(Path.home()): "~", sys.prefix: "<environment>"}
    places = {place: name for place, name in places.items() if len(place) > 1}  # home may be "/"
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = fewer_colours(output.data["image/png"])
            for holder in (output, output.get("data", {})):
                for key, value in list(holder.items()):
                    if isinstance(value, str) and not key.startswith("image/"):
                        for place, name in sorted(places.items(), key=lambda p: -len(p[0])):
                            value = value.replace(place + "/", name + "/")
                        holder[key] = re.sub(r"\S*ipykernel_\d+/\d+\.py", "<cell>", value)


def run(path: Path, redraw: bool, record: bool) -> float:
    """Execute one notebook with its own folder as working directory; returns the seconds it took."""
    notebook, started = nbformat.read(path, as_version=4), time.time()
    if redraw:
        notebook.cells = [c for c in notebook.cells if REDRAW_TAGS & set(c.metadata.get("tags", []))]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    Client(notebook, timeout=None, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(HERE)}},
           extra_arguments=["--log-level=40"]).execute()  # below errors the kernel only notes that it uses TCP
    if record and not redraw:
        strip(notebook)
        partial = path.with_suffix(".partial")
        nbformat.write(notebook, partial)
        partial.replace(path)
    return time.time() - started


def figures() -> Path:
    """Where this run's figures go."""
    from lab import settings  # loads torch: not before it is needed

    return settings(os.environ["TSAE_PROFILE"])[1]


def keep_times(seconds: dict[str, float]) -> None:
    """Write figures/<profile>/times.csv: seconds of each notebook's last run. A run that finds trained SAEs is a short one."""
    path = figures() / "times.csv"
    kept = dict(line.split(",") for line in path.read_text().splitlines()[1:]) if path.exists() else {}
    kept |= {name: f"{s:.0f}" for name, s in seconds.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("notebook,seconds\n" + "".join(f"{name},{kept[name]}\n" for name in sorted(kept)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="notebook numbers; all by default")
    parser.add_argument("--profile", default=None, help="smoke, mini (default), record, gpt2-lite, gpt2 or pythia")
    parser.add_argument("--redraw", action="store_true", help="only draw, from the CSVs (default profile: record)")
    parser.add_argument("--record", action="store_true", help="profile record, and keep the executed notebooks")
    args = parser.parse_args()
    default = "record" if args.redraw or args.record else os.environ.get("TSAE_PROFILE") or "mini"
    os.environ["TSAE_PROFILE"] = args.profile or default
    os.environ["TSAE_TEXT_PROGRESS"] = "1"
    if args.record and args.profile not in (None, "record"):
        raise SystemExit("--record keeps notebooks executed at profile record: leave --profile out")
    sources = ("TSAE_MODEL", "TSAE_CORPUS", "TSAE_NGRAM_CORPUS", "TSAE_PUBLISHED")
    if args.record and any(os.environ.get(v) for v in (*sources, "TSAE_BUDGET", "TSAE_FIGURES")):
        raise SystemExit(f"--record is for the testbed: unset {', '.join(sources)}, TSAE_BUDGET and TSAE_FIGURES")
    for name in (*sources, "TSAE_FIGURES", "TSAE_CACHE"):  # relative to where the user typed them
        value = os.environ.get(name)
        if value and (name in ("TSAE_FIGURES", "TSAE_CACHE") or Path(value).exists()):
            os.environ[name] = str(Path(value).resolve())
    notebooks, failed, seconds, began = chosen(args.numbers), [], {}, time.time()
    if args.redraw and not args.numbers:  # what has a CSV to draw from
        notebooks = [n for n in notebooks if (figures() / f"{n.stem[3:]}.csv").exists()]
    for i, path in enumerate(notebooks, 1):
        print(f"[{i}/{len(notebooks)}] {path.stem} ({os.environ['TSAE_PROFILE']})", flush=True)
        try:
            seconds[path.stem] = run(path, args.redraw, args.record)
            print(f"\n    done in {seconds[path.stem]:.0f} s", flush=True)
        except (CellExecutionError, DeadKernelError) as error:
            failed.append(path.stem)
            foreseen = getattr(error, "ename", "") in {"ValueError", "FileNotFoundError"}  # these speak for themselves
            text = error.evalue if foreseen else re.sub(chr(27) + r"[^m]*m", "", str(error))
            print(f"\n    FAILED: {text}", file=sys.stderr, flush=True)
            if foreseen and i == 1:
                break  # a wrong profile, model or corpus fails every notebook alike
    print(f"{len(notebooks) - len(failed)} of {len(notebooks)} notebooks in {time.time() - began:.0f} s")
    if seconds and not (args.redraw or args.record):  # a record finds trained SAEs in the cache: its times say little
        keep_times(seconds)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
