"""Check a folder of figures, such as a contributed one: complete, consistent, from the right model.

    python tools/verify.py gpt2        # checks figures/gpt2/; also `make verify PROFILE=gpt2`

Prints every problem and fails if there is one. The check cannot tell whether the numbers are true.
It tells whether they are what the notebooks write at this profile: all files exist, all notebooks
ran on one model and corpus at the profile's settings, claims and their rules are the committed
ones, and the weights are those of the pinned commit.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from PIL import Image

from notebooks.lab.claims import COLUMNS, PAPER_VERDICTS, VERDICTS, read_claims
from notebooks.lab.data import corpus_key
from notebooks.lab.profiles import PROFILES, ROOT, settings

WEIGHTS = {  # SHA-256 of model.safetensors
    "testbed": "a2347e095a6a00c24363c5205faf74df0f90d153620b7c25e536049e18feaa4d",
    "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e": (
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707"
    ),
    # Not known here: to be compared with the hub's page.
    "EleutherAI/pythia-1.4b@fedc38a16eea3bd36a96b906d78d11d2ce18ed79": "",
}
DECLARED = ("claim", "source", "rule", "paper")  # columns that a run cannot change
KNOWN_VERDICTS = {*VERDICTS, *PAPER_VERDICTS, "not applicable"}
MOST_MB = 40


def ids() -> list[str]:
    """Figure ids of all notebooks but the scorecard."""
    notebooks = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return [path.stem[3:] for path in notebooks if not path.stem.startswith("99")]


def read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


# -- files --


def missing_files(folder: Path) -> list[str]:
    """Files that are missing or empty, and a folder that is too large."""
    problems = []
    for figure_id in ids():
        claims = ["_claims.csv"] if read_claims(figure_id) else []
        for ending in (".csv", ".json", ".pdf", ".png", *claims):
            path = folder / f"{figure_id}{ending}"
            if not path.is_file() or path.stat().st_size == 0:
                problems.append(f"{path.name} is missing or empty: run its notebook")
    if not (folder / "claims.csv").is_file():
        problems.append("claims.csv is missing: run notebook 99")
    megabytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if megabytes > MOST_MB:
        problems.append(f"{megabytes:.0f} MB: figures are kept below {MOST_MB} MB")
    return problems


def problem_of_table(path: Path) -> str:
    try:
        return f"{path.name} has no rows" if pd.read_csv(path).empty else ""
    except ValueError as error:  # pandas raises ValueErrors when it cannot parse
        return f"{path.name} is no table ({error})"


def problem_of_record(path: Path) -> str:
    try:
        record = json.loads(path.read_text())
        return "" if isinstance(record["profile"], dict) else f"{path.name} names no profile"
    except (ValueError, KeyError, TypeError) as error:
        return f"{path.name} is no record of a run ({error!r})"


def problem_of_picture(path: Path) -> str:
    try:
        Image.open(path).verify()
        return ""
    except (OSError, SyntaxError) as error:
        return f"{path.name} is no picture ({error})"


def problem_of_claims(path: Path) -> str:
    missing = set(COLUMNS) - set(read_table(path))
    return f"{path.name} lacks {', '.join(sorted(missing))}" if missing else ""


def check_files(folder: Path) -> list[str]:
    """Files that are missing, are empty or cannot be read."""
    problems = missing_files(folder)
    checks: dict[str, Callable[[Path], str]] = {
        "*.csv": problem_of_table,
        "*.json": problem_of_record,
        "*.png": problem_of_picture,
    }
    for pattern, check in checks.items():
        problems += filter(None, map(check, sorted(folder.glob(pattern))))
    if not problems:
        problems += filter(None, map(problem_of_claims, sorted(folder.glob("*_claims.csv"))))
    return problems


# -- contents --


def check_runs(folder: Path, profile: str) -> list[str]:
    """Records that differ from the profile, from each other, or from the pinned model."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    p, problems = PROFILES[profile], []
    expected = json.loads(json.dumps(p.flat()))
    expected.pop("gib")  # the number of passes changes no number
    model, corpus = p.source.model, p.source.corpus
    for figure_id, record in records.items():
        for name, value in expected.items():
            used = record["profile"].get(name)
            if used != value:
                problems.append(
                    f"{figure_id}: {name} is {used!r}, but {value!r} in profile {profile}"
                )
        weights = record.get("weights_sha256")
        if WEIGHTS[model] and weights != WEIGHTS[model]:
            problems.append(
                f"{figure_id}: the SHA-256 of the weights is {weights!r}, "
                f"but {WEIGHTS[model]} for {model}"
            )
    for name in ("model", "model_hash", "weights_sha256", "corpus_hash", "torch"):
        values = {str(record.get(name)) for record in records.values()}
        if len(values) > 1:
            problems.append(f"{name} differs between notebooks: {', '.join(sorted(values))}")
    hashes = {record.get("corpus_hash") for record in records.values()}
    if corpus != "testbed" and hashes != {corpus_key(corpus)}:
        problems.append(f"the corpus is not {corpus}")
    return problems


def check_claims(folder: Path) -> list[str]:
    """Claims that differ from the declared ones in anything but their outcome."""
    problems = []
    declared = {id: claim for figure_id in ids() for id, claim in read_claims(figure_id).items()}
    tables = [read_table(path) for path in sorted(folder.glob("*_claims.csv"))]
    judged = pd.concat(tables, ignore_index=True)
    if not read_table(folder / "claims.csv").equals(judged):
        problems.append("claims.csv does not gather the notebooks' claims: run notebook 99 again")
    if different := set(judged.id) ^ set(declared):
        problems.append(f"claims missing or unknown: {', '.join(sorted(different))}")
    for row in judged.to_dict("records"):
        claim = declared.get(row["id"], row)
        if any(row[column] != claim[column] for column in DECLARED):
            problems.append(f"{row['id']}: its wording or rule is not the committed one")
        if row["verdict"] not in KNOWN_VERDICTS:
            problems.append(f"{row['id']}: unknown verdict {row['verdict']!r}")
    return problems


def check_machine_paths(folder: Path) -> list[str]:
    """Records and claims that name a folder of the machine on which they were made."""
    paths = [*folder.glob("*.json"), *folder.glob("*claims.csv")]
    return [
        f"{path.name} names a folder of its machine"
        for path in paths
        if re.search(r"/(home|Users|root|mnt)/\w", path.read_text())
    ]


def verify(folder: Path, profile: str) -> list[str]:
    """All problems, in words; none if the folder is in order."""
    if not folder.is_dir():
        return [f"there is no folder {folder}: run `make figures PROFILE={profile}` first"]
    if problems := check_files(folder):
        return problems
    return [*check_runs(folder, profile), *check_claims(folder), *check_machine_paths(folder)]


def main() -> None:
    profile = sys.argv[1] if len(sys.argv) > 1 else "gpt2"
    if profile not in PROFILES:
        sys.exit(f"unknown profile {profile!r}: there are {', '.join(PROFILES)}")
    folder = settings(profile)[1]
    problems = verify(folder, profile)
    model = PROFILES[profile].source.model
    if not WEIGHTS[model]:
        print(
            f"the SHA-256 of {model} is not known here: "
            "compare the weights_sha256 of the records with the hub's page"
        )
    print("\n".join(problems) or f"{folder}: in order, {len(ids())} notebooks")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
