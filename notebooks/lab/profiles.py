"""Profiles run the same notebooks at several scales. A profile is data; no notebook branches on it.

The environment overrides a profile: TSAE_MODEL, TSAE_CORPUS, TSAE_NGRAM_CORPUS and TSAE_PUBLISHED
replace its sources, TSAE_GIB its memory limit, and TSAE_BUDGET scales its token budgets.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import tsae_utils as tu

ROOT = Path(__file__).resolve().parents[2]
PAPER_PROFILES = ("gpt2", "pythia")  # unchanged, only these can reproduce the paper's numbers


@dataclass(frozen=True)
class Source:
    """What is studied. Sources on the hub are pinned to a commit ("name@commit")."""

    model: str = "testbed"
    corpus: str = "testbed"
    ngram_corpus: str = ""  # figure 1 counts n-grams here; empty: the corpus
    published: str = ""  # SAEs that stand for the paper's, one folder per hook point
    context_size: int = 256  # tokens per row, BOS included; the paper's


@dataclass(frozen=True)
class Grid:
    """What is compared. Depths are shares of the model's layers, widths multiples of d_model."""

    depth: float = 2 / 3  # the main layer: testbed 4 of 6, GPT-2 8 of 12, Pythia 16 of 24
    depths: tuple[float, ...] = (5 / 12, 8 / 12, 11 / 12)  # figures 2 and 3; GPT-2: 5, 8, 11
    speedup_depths: tuple[float, ...] = (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)  # notebook 10
    expansion: int = 16  # the main width
    expansions: tuple[int, ...] = (4, 8, 16, 32, 64)  # notebooks 07 and 12
    k: int = 16  # where one sparsity is enough
    ks: tuple[int, ...] = (4, 8, 16, 32, 64)
    l1s: tuple[float, ...] = (4.0, 10.0, 24.0)  # figure 6: relu; gated takes twice these
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """How SAEs are trained."""

    batch_size: int = 4096  # tokens per step
    buffer_tokens: int = 2**17  # tokens shuffled together
    lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128)  # searched
    table_lrs: tuple[float, ...] = ()  # further rates for figure 6's table-only
    sae_lr: float = 8e-3  # where a notebook has no search: figure 6's choices
    tsae_lr: float = 4e-3
    lr_end: float = 0.0  # learning rates fall to this share
    gib: float = 16.0  # memory of SAEs trained in one pass, gradients and Adam included


@dataclass(frozen=True)
class Budget:
    """How much is trained and measured. Fields that end in `tokens` count tokens."""

    tokens: int = 2_000_000  # training tokens of an SAE
    probe_tokens: int = 500_000  # training tokens, figure 2
    lr_tokens: int = 1_000_000  # training tokens of one run of the rate search
    architecture_tokens: int = 1_000_000  # training tokens, figure 6: batchtopk, relu, gated
    ablation_tokens: int = 1_000_000  # training tokens, notebook 11
    budgets: tuple[int, ...] = (500_000, 2_000_000)  # training tokens, notebook 10
    eval_tokens: int = 24_000  # held-out tokens for cross-entropy
    curve_tokens: int = 6_000  # held-out tokens for measurements during training
    curve_points: int = 12  # such measurements per run
    feature_tokens: int = 100_000  # held-out tokens on which features are studied
    features: int = 512  # features sampled per SAE
    ngram_tokens: int = 20_000_000  # n-grams are counted on at most this many tokens
    ngrams: int = 20_000  # bigrams at most, figures 2 and 3
    patch_rows: int = 64  # held-out rows, figure 5
    patch_positions: int = 24  # positions per row, figure 5


@dataclass(frozen=True)
class Profile:
    """A scale at which the notebooks run."""

    name: str
    notebooks: tuple[str, ...] = ()  # numbers of those it runs; all unless given
    source: Source = field(default_factory=Source)
    grid: Grid = field(default_factory=Grid)
    recipe: Recipe = field(default_factory=Recipe)
    budget: Budget = field(default_factory=Budget)

    def with_changes(self, name: str, **changes) -> Profile:
        """A copy under another name. `changes` name fields of any of the four groups.

        Raises TypeError for an unknown field.
        """
        groups = {}
        for group in ("source", "grid", "recipe", "budget"):
            known = {f.name for f in fields(getattr(self, group))}
            fields_of_group = {key: changes.pop(key) for key in known & changes.keys()}
            groups[group] = replace(getattr(self, group), **fields_of_group)
        notebooks = changes.pop("notebooks", self.notebooks)
        if changes:
            raise TypeError(f"a profile has no field {', '.join(changes)}")
        return Profile(name, notebooks, **groups)

    def flat(self) -> dict:
        """All fields in one dict, as records store them; without folders of this machine."""
        groups = (self.source, self.grid, self.recipe, self.budget)
        values = {key: value for group in groups for key, value in asdict(group).items()}
        for key in ("model", "corpus", "ngram_corpus", "published"):
            values[key] = public_name(values[key])
        return {"name": self.name, **values}


RECORD = Profile("record")  # hours on two cores: the committed figures
MINI = RECORD.with_changes(  # the default of make: a quarter of an hour on two cores
    "mini",
    ks=(8, 32),
    seeds=(0,),
    tokens=400_000,
    probe_tokens=200_000,
    lrs=(4e-3, 8e-3),
    lr_tokens=60_000,
    l1s=(10.0,),
    architecture_tokens=60_000,
    eval_tokens=10_000,
    ngrams=4_000,
    patch_rows=16,
    patch_positions=16,
    speedup_depths=(4 / 6,),
    budgets=(100_000, 400_000),
    curve_tokens=3_000,
    curve_points=8,
    ablation_tokens=200_000,
    expansions=(4, 16),
    feature_tokens=30_000,
    features=256,
)
SMOKE = RECORD.with_changes(  # tests: each notebook in seconds
    "smoke",
    expansion=1,
    ks=(4,),
    k=4,
    seeds=(0, 1),
    tokens=4_096,
    probe_tokens=4_096,
    batch_size=512,
    buffer_tokens=2_048,
    lrs=(4e-3,),
    lr_tokens=1_024,
    l1s=(10.0,),
    architecture_tokens=2_048,
    eval_tokens=1_024,
    ngram_tokens=50_000,
    ngrams=200,
    patch_rows=2,
    patch_positions=4,
    speedup_depths=(4 / 6,),
    budgets=(2_048, 4_096),
    curve_tokens=512,
    curve_points=3,
    ablation_tokens=1_024,
    expansions=(1, 2),
    feature_tokens=2_048,
    features=16,
)
GPT2 = RECORD.with_changes(  # the paper's settings where they are known
    "gpt2",
    model="openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    corpus="allenai/c4:en@1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    ngram_corpus="Skylion007/openwebtext:plain_text@79d93d786212f7344586290adb811d4ae6a1762c",
    published="jbloom/GPT2-Small-SAEs-Reformatted@57d08a4fd333fbf18caf3fbea63ceeb88e2f50d9",
    ks=(5, 10, 20, 30, 50),
    k=30,
    tokens=300_000_000,
    probe_tokens=60_000_000,
    lrs=(1e-4,),
    table_lrs=(1e-3, 1e-2),
    sae_lr=1e-4,
    tsae_lr=1e-4,
    lr_end=0.3,
    l1s=(8.0, 16.0, 32.0, 64.0),
    architecture_tokens=300_000_000,
    eval_tokens=100_000,
    speedup_depths=tuple(i / 12 for i in range(5, 12)),
    budgets=(75_000_000, 300_000_000),
    curve_tokens=20_000,
    curve_points=16,
    ablation_tokens=131_000_000,
    feature_tokens=300_000,
    ngram_tokens=100_000_000,
    ngrams=35_000,
    gib=12.0,
)
GPT2_LITE = GPT2.with_changes(  # a tenth of the tokens, one seed; a short run may want higher rates
    "gpt2-lite",
    ks=(10, 30),
    seeds=(0,),
    depths=(8 / 12,),
    tokens=30_000_000,
    probe_tokens=10_000_000,
    lrs=(1e-4, 4e-4, 1.6e-3),
    table_lrs=(1e-2,),
    lr_tokens=3_000_000,
    sae_lr=4e-4,
    tsae_lr=4e-4,
    l1s=(8.0, 32.0),
    architecture_tokens=10_000_000,
    eval_tokens=50_000,
    speedup_depths=(8 / 12,),
    budgets=(7_500_000, 30_000_000),
    curve_tokens=10_000,
    ablation_tokens=10_000_000,
    expansions=(4, 16, 32),
    feature_tokens=100_000,
    ngram_tokens=30_000_000,
    ngrams=20_000,
)
PYTHIA = GPT2.with_changes(
    "pythia",
    model="EleutherAI/pythia-1.4b@fedc38a16eea3bd36a96b906d78d11d2ce18ed79",
    published="",
    depths=(12 / 24, 16 / 24, 20 / 24),
    expansion=8,
    ks=(30, 50),
    k=50,
    tokens=131_000_000,
    probe_tokens=30_000_000,
    l1s=(8.0, 32.0),
    architecture_tokens=30_000_000,
    eval_tokens=50_000,
    speedup_depths=(12 / 24, 16 / 24, 20 / 24),
    budgets=(32_000_000, 131_000_000),
    expansions=(4, 8, 16),
    feature_tokens=100_000,
)
SMOLLM2_MINI = MINI.with_changes(  # a published model on two cores: one layer, one seed
    "smollm2-mini",
    notebooks=("00", "02", "05", "06", "08", "99"),
    model="smollm2",
    context_size=128,
    buffer_tokens=2**15,
    tokens=200_000,
    probe_tokens=100_000,
    architecture_tokens=40_960,
    depths=(2 / 3,),
    expansion=8,
    k=8,
    lrs=(4e-3,),
    sae_lr=4e-3,
    tsae_lr=4e-3,
    lr_tokens=20_480,
    eval_tokens=4_000,
    patch_rows=8,
    patch_positions=8,
    gib=12.0,
)
PROFILES = {p.name: p for p in (RECORD, MINI, SMOKE, SMOLLM2_MINI, GPT2_LITE, GPT2, PYTHIA)}


def public_name(source: str) -> str:
    """A source without the folders of this machine."""
    return Path(source).name if Path(source).expanduser().exists() else source


def rehearsal(p: Profile, share: str) -> Profile:
    """The profile with a share of its token budgets, at least one batch each.

    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < float(share) <= 1:
        raise ValueError(
            f"TSAE_BUDGET={share} must be a share of the profile's tokens, above 0 and at most 1"
        )
    batch = p.recipe.batch_size
    names = [f.name for f in fields(Budget) if f.name.endswith("tokens")]
    scaled = {n: max(batch, int(float(share) * getattr(p.budget, n))) for n in names}
    budgets = [max((i + 1) * batch, int(float(share) * n)) for i, n in enumerate(p.budget.budgets)]
    return p.with_changes(p.name, **scaled, budgets=tuple(budgets))


def is_papers_setting(p: Profile) -> bool:
    """Whether this is an unchanged profile of the paper's models; the memory limit may differ."""
    return any(p == PROFILES[n].with_changes(n, gib=p.recipe.gib) for n in PAPER_PROFILES)


def settings(profile: str) -> tuple[Profile, Path]:
    """A profile as the environment changes it, and the folder of its figures.

    Raises ValueError for an unknown profile or a budget that is not a share.
    """
    if profile not in PROFILES:
        known = ", ".join(PROFILES)
        raise ValueError(f"unknown profile {profile!r}: TSAE_PROFILE must be one of {known}")
    changes = {}
    for key in ("model", "corpus", "ngram_corpus", "published"):
        if os.environ.get(f"TSAE_{key.upper()}"):
            changes[key] = os.environ[f"TSAE_{key.upper()}"]
    if "corpus" in changes:  # another corpus serves figure 1, too
        changes.setdefault("ngram_corpus", "")
    if "model" in changes:  # another model has no published SAEs
        changes.setdefault("published", "")
    p = PROFILES[profile].with_changes(profile, **changes)
    if os.environ.get("TSAE_GIB"):
        p = p.with_changes(profile, gib=float(os.environ["TSAE_GIB"]))
    folder = f"{profile}-{Path(tu.hub_name(p.source.model)[0]).name}" if changes else profile
    if share := os.environ.get("TSAE_BUDGET"):
        p, folder = rehearsal(p, share), f"{folder}-x{share}"
    return p, Path(os.environ.get("TSAE_FIGURES") or ROOT / "figures") / folder
