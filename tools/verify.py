"""Check a folder of figures, such as one that someone contributes: complete, of one piece, from the right model.

    python notebooks/verify.py gpt2        # figures/gpt2/; `make verify PROFILE=gpt2`

Prints every problem and fails where there is one. It cannot tell whether the numbers are true, only that they are what these
notebooks write at this profile: every file is there, all notebooks ran on one model and corpus at the profile's settings,
claims and their rules are the committed ones, and the weights are those of the pinned commit.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
from lab import PROFILES, ROOT, as_recorded, corpus_key, settings
from PIL import Image

WEIGHTS = {  # SHA-256 of model.safetensors
    "testbed": "a2347e095a6a00c24363c5205faf74df0f90d153620b7c25e536049e18feaa4d",
    "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "EleutherAI/pythia-1.4b@fedc38a16eea3bd36a96b906d78d11d2ce18ed79": "",  # not known here: compare with the hub's page
}
RULES = ["id", "claim", "source", "rule", "paper"]
MOST_MB = 40


def ids() -> list[str]:
    """Figure ids of all notebooks but the scorecard."""
    return [
        n.stem[3:]
        for n in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        if not n.stem.startswith("99")
    ]


def files(folder: Path) -> list[str]:
    """What is missing, empty or cannot be read."""
    wrong = []
    for id in ids():
        for name in (f"{id}.csv", f"{id}.json", f"{id}.pdf", f"{id}.png", f"{id}_claims.csv"):
            if not (folder / name).is_file() or (folder / name).stat().st_size == 0:
                wrong.append(f"{name} is missing or empty: run its notebook")
    for path in sorted(folder.glob("*.csv")):
        try:
            if pd.read_csv(path).empty:
                wrong.append(f"{path.name} has no rows")
        except ValueError as error:  # pandas's errors of parsing are ValueErrors
            wrong.append(f"{path.name} is no table ({error})")
    for path in sorted(folder.glob("*.json")):
        try:
            if not isinstance(json.loads(path.read_text())["profile"], dict):
                wrong.append(f"{path.name} names no profile")
        except (ValueError, KeyError, TypeError) as error:
            wrong.append(f"{path.name} is no record of a run ({error!r})")
    for path in sorted(folder.glob("*_claims.csv")) if not wrong else []:
        if missing := {*RULES, "ours", "n_seeds", "model", "verdict"} - set(pd.read_csv(path)):
            wrong.append(f"{path.name} lacks {', '.join(sorted(missing))}")
    for path in sorted(folder.glob("*.png")):
        try:
            Image.open(path).verify()
        except (OSError, SyntaxError) as error:
            wrong.append(f"{path.name} is no picture ({error})")
    if not (folder / "claims.csv").is_file():
        wrong.append("claims.csv is missing: run notebook 99")
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6
    return wrong + (
        [f"{size:.0f} MB: figures are kept below {MOST_MB} MB"] if size > MOST_MB else []
    )


def runs(folder: Path, profile: str) -> list[str]:
    """Records that differ from the profile, from each other, or from the pinned model."""
    wrong, found = (
        [],
        {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))},
    )
    p = PROFILES[profile]
    expected = json.loads(json.dumps(as_recorded(p)))
    expected.pop("gib")  # how many passes it took changes no number
    for id, run in found.items():
        for name, value in expected.items():
            if run["profile"].get(name) != value:
                wrong.append(
                    f"{id}: {name} is {run['profile'].get(name)!r}, profile {profile} has {value!r}"
                )
        if WEIGHTS[p.model] and run.get("weights_sha256") != WEIGHTS[p.model]:
            wrong.append(
                f"{id}: the weights' SHA-256 is {run.get('weights_sha256')!r}, that of {p.model} is {WEIGHTS[p.model]}"
            )
    for name in ("model", "model_hash", "weights_sha256", "corpus_hash", "torch"):
        if len(values := {str(run.get(name)) for run in found.values()}) > 1:
            wrong.append(f"{name} differs between notebooks: {', '.join(sorted(values))}")
    if p.corpus != "testbed" and any(
        run.get("corpus_hash") != corpus_key(p.corpus) for run in found.values()
    ):
        wrong.append(f"the corpus is not {p.corpus}")
    return wrong


def claims(folder: Path) -> list[str]:
    """Claims that differ from the committed ones in anything but their outcome."""

    def read(path: Path) -> pd.DataFrame:
        return pd.read_csv(path, dtype=str, keep_default_na=False)

    wrong, committed = [], read(ROOT / "figures" / "record" / "claims.csv").set_index("id")
    parts = [read(path) for path in sorted(folder.glob("*_claims.csv"))]
    every = (
        pd.concat(parts, ignore_index=True)
        if parts
        else pd.DataFrame(columns=committed.reset_index().columns)
    )
    if not read(folder / "claims.csv").equals(every):
        wrong.append(
            "claims.csv is not what the notebooks' claims add up to: run notebook 99 again"
        )
    if set(every.id) != set(committed.index):
        wrong.append(
            f"claims missing or unknown: {', '.join(sorted(set(every.id) ^ set(committed.index)))}"
        )
    for row in every.to_dict("records"):
        if row["id"] in committed.index and any(
            row[c] != committed[c][row["id"]] for c in RULES[1:]
        ):
            wrong.append(f"{row['id']}: its wording or rule is not the committed one")
        if row["verdict"] not in (
            "reproduced",
            "direction only",
            "not reproduced",
            "effect present",
            "effect absent",
            "not tested",
            "not applicable",
        ):
            wrong.append(f"{row['id']}: unknown verdict {row['verdict']!r}")
    return wrong


def places(folder: Path) -> list[str]:
    """Paths of the machine that ran it, in what is read by eye or by other tools."""
    texts = [*folder.glob("*.json"), *folder.glob("*claims.csv")]
    return [
        f"{path.name} names a folder of its machine"
        for path in texts
        if re.search(r"/(home|Users|root|mnt)/\w", path.read_text())
    ]


def verify(folder: Path, profile: str) -> list[str]:
    """All problems, in words; none for a folder that is in order."""
    if not folder.is_dir():
        return [f"there is no folder {folder}: run `make figures PROFILE={profile}` first"]
    wrong = files(folder)
    return wrong or [*runs(folder, profile), *claims(folder), *places(folder)]


if __name__ == "__main__":
    profile = sys.argv[1] if len(sys.argv) > 1 else "gpt2"
    if profile not in PROFILES:
        sys.exit(f"unknown profile {profile!r}: there are {', '.join(PROFILES)}")
    folder = settings(profile)[1]
    problems = verify(folder, profile)
    if not WEIGHTS[PROFILES[profile].model]:
        print(
            f"the SHA-256 of {PROFILES[profile].model} is not known here: compare the records' weights_sha256 with the hub's page"
        )
    print("\n".join(problems) or f"{folder}: in order, {len(ids())} notebooks")
    sys.exit(bool(problems))
