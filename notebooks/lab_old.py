"""What the notebooks share: profiles, corpora, train-or-load, figures, records and claims.

A notebook makes one `Lab(figure_id, profile)` and asks it for the model, rows, trained SAEs and places to write to.
Nothing here knows what a notebook does with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

if os.environ.get(
    "TSAE_TEXT_PROGRESS"
):  # set by run.py: bars as text, so that a terminal and a saved notebook show them
    import tqdm.notebook

    tqdm.notebook.IProgress = None
    warnings.filterwarnings("ignore", message="IProgress not found")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib.pyplot as plt  # noqa: E402
import matplotlib.ticker as ticker  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from huggingface_hub import try_to_load_from_cache  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from scipy import stats  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

os.environ.setdefault(
    "HF_UPDATE_DOWNLOAD_COUNTS", "0"
)  # nothing is sent anywhere, not even a count of loads

import interop  # noqa: E402
import tsae_utils as tu  # noqa: E402
from testbed import corpus as testbed_corpus  # noqa: E402

tu.keep_freed_memory()
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

# ---------------------------------------------------------------------------------------------
# Profiles: the same notebooks at several scales. A profile is data.
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Model, corpus and grid. Depths are shares of the model's layers, widths multiples of d_model; what lies on the hub
    is pinned to a commit ("name@commit")."""

    name: str
    model: str = "testbed"
    corpus: str = "testbed"
    ngram_corpus: str = ""  # figure 1; without it the corpus
    published: str = ""  # a folder for each hook point: SAEs that stand for the paper's in figures 2, 3, 4 and 7, tables 1 and 3
    context_size: int = 256  # the paper's
    depth: float = 2 / 3  # the main layer: testbed 4 of 6, GPT-2 8 of 12, Pythia 16 of 24
    depths: tuple[float, ...] = (
        5 / 12,
        8 / 12,
        11 / 12,
    )  # figures 2 and 3; the paper: GPT-2 layers 5, 8, 11
    expansion: int = 16
    ks: tuple[int, ...] = (4, 8, 16, 32, 64)
    k: int = 16  # where one k is enough
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 2_000_000  # activations each SAE sees
    probe_tokens: int = 500_000  # the SAEs of figure 2, nine of every system
    batch_size: int = 4096
    buffer_tokens: int = 2**17
    lrs: tuple[float, ...] = (
        2e-3,
        4e-3,
        8e-3,
        1.6e-2,
        3.2e-2,
        6.4e-2,
        0.128,
    )  # the grid of every system
    lr_tokens: int = 1_000_000  # a run of the search
    table_lrs: tuple[
        float, ...
    ] = ()  # more rates for figure 6's table-only, whose one rate is the table's
    sae_lr: float = 8e-3  # where a notebook has no search of its own: what figure 6's chose (fig6_pareto_lr.csv)
    tsae_lr: float = 4e-3
    lr_end: float = 0.0  # learning rates fall to this share
    l1s: tuple[float, ...] = (4.0, 10.0, 24.0)  # figure 6: relu; gated twice that
    architecture_tokens: int = 1_000_000  # figure 6: batchtopk, relu, gated
    eval_tokens: int = 24_000  # held-out tokens for cross-entropy
    speedup_depths: tuple[float, ...] = (
        1 / 6,
        2 / 6,
        3 / 6,
        4 / 6,
        5 / 6,
    )  # notebook 10: every layer of the testbed but the embedding
    budgets: tuple[int, ...] = (500_000, 2_000_000)  # notebook 10
    curve_tokens: int = 6_000  # held-out tokens of its measurements on the way
    curve_points: int = 12
    ablation_tokens: int = 1_000_000  # notebook 11
    expansions: tuple[int, ...] = (
        4,
        8,
        16,
        32,
        64,
    )  # notebooks 07 and 12: widths in multiples of d_model
    feature_tokens: int = (
        100_000  # held-out tokens on which features are studied: notebooks 04, 07, 08, 09, 11
    )
    features: int = 512  # features of each SAE in a study
    ngram_tokens: int = 20_000_000  # n-grams are counted on so many tokens at most
    ngrams: int = 20_000  # figures 2 and 3: at most so many bigrams
    patch_rows: int = 64  # figure 5: held-out rows
    patch_positions: int = 24  # figure 5: positions a row
    gib: float = 16.0  # SAEs trained in one pass of the language model, with gradients and Adam: more of them take more passes


GPT2 = Profile(  # the paper's settings, where they are known; seeds and the rest as in `record`
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
PROFILES = {
    "record": Profile("record"),
    "mini": Profile(
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
    ),
    "smoke": Profile(
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
    ),
    # a tenth of the tokens and one seed; the authors' rate is the lowest of the grid, as a short run may want a higher one
    "gpt2-lite": replace(
        GPT2,
        name="gpt2-lite",
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
    ),
    "gpt2": GPT2,
    "pythia": replace(
        GPT2,
        name="pythia",
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
    ),
}
CACHE_VERSION = {
    "batchtopk": 4
}  # 3 for the others; raise when a change of code changes what training makes

PAPER_PROFILES = (
    "gpt2",
    "pythia",
)  # here, unchanged, a claim can be reproduced; elsewhere its effect is present or absent

# One look for each system in every figure: Okabe-Ito colours, told apart by marker too
SYSTEMS = {
    "topk": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "topk+lookup": {"color": "#D55E00", "marker": "s", "linestyle": "-"},
    "topk-size-matched": {"color": "#56B4E9", "marker": "^", "linestyle": "--"},
    "topk-k+1": {"color": "#009E73", "marker": "v", "linestyle": "--"},
    "topk+shuffled-lookup": {"color": "#CC79A7", "marker": "X", "linestyle": ":"},
    "topk-half-encoder": {"color": "#999999", "marker": "<", "linestyle": "--"},
    "table-only": {"color": "#000000", "marker": "P", "linestyle": ":"},
    "relu": {"color": "#56B4E9", "marker": "D", "linestyle": "-"},
    "relu+lookup": {"color": "#E69F00", "marker": "d", "linestyle": "-"},
    "batchtopk": {"color": "#0072B2", "marker": "p", "linestyle": "-"},
    "batchtopk+lookup": {"color": "#D55E00", "marker": "*", "linestyle": "-"},
    "gated": {"color": "#56B4E9", "marker": "h", "linestyle": "-"},
    "gated+lookup": {"color": "#E69F00", "marker": "H", "linestyle": "-"},
    "gated+lookup (1e-4)": {"color": "#CC79A7", "marker": "8", "linestyle": ":"},
    "topk+lookup (zero start)": {"color": "#E69F00", "marker": "D", "linestyle": "--"},
    "untrained table": {"color": "#000000", "marker": "x", "linestyle": ":"},
    "published": {"color": "#009E73", "marker": "D", "linestyle": "-"},
}


@dataclass(frozen=True)
class Arm:
    """One SAE to train: everything that decides its weights, so that it can be found again by its hash."""

    system: str
    d_sae: int
    k: int
    lr: float
    activation: str = "topk"
    l1_coefficient: float = 0.0
    start: str = ""  # rows of the table: "" no table, unigram A([BOS, t])_1, shuffled (over wrong tokens), mean (of the token), zero
    table_scale: float = 1.0  # times that
    encoder_scale: float = 1.0  # W_enc starts as this times W_dec^T
    lr_lookup: float = 1e-2  # the authors' value for TopK's table
    frozen: bool = False  # the table is not trained
    aux_k: int = 0  # AuxK's dead features
    start_l0: float = 0.0  # relu, gated: features active at the start
    curve: int = 0  # held-out tokens for measurements on the way, spaced logarithmically


# Table and encoder at half scale, as in the authors' revised code: together they start at x, not at twice x
HALF = {"table_scale": 0.5, "encoder_scale": 0.5}
LOOKUP = {"start": "unigram", **HALF}


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of paired differences, 95 % by Student's t; the interval is infinite for one seed."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        return float(d.mean()), -np.inf, np.inf
    half = stats.t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def bootstrap_interval(
    statistic, *columns: np.ndarray, n: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(value, low, high) of `statistic(*columns)`, 95 % by resampling rows."""
    rng = np.random.default_rng(seed)
    columns = [np.asarray(c) for c in columns]
    draws = [
        statistic(*(c[i] for c in columns))
        for i in rng.integers(len(columns[0]), size=(n, len(columns[0])))
    ]
    return float(statistic(*columns)), *(float(q) for q in np.percentile(draws, [2.5, 97.5]))


def _plain(value: float, _: int = 0) -> str:
    """0.02, 5, 2,000 as 2K, 1,000,000 as 1M."""
    for size, letter in ((1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}" if value > 1e-4 else f"{value:.0e}"


def plain_log(*axes: plt.Axes) -> None:
    """Log axes with plain numbers at 1, 2 and 5, and no crowd of minor labels."""
    for ax in axes:
        for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
            if scale == "log":
                low, high = axis.get_view_interval()
                axis.set_major_locator(
                    ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,))
                )
                axis.set_major_formatter(ticker.FuncFormatter(_plain))
                axis.set_minor_formatter(ticker.NullFormatter())


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Let one process at a time train the same SAEs; the others wait and then load them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def save_atomically(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A safetensors file in the cache, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(tensors, partial)
    partial.replace(path)


def corpus_key(corpus: str) -> str:
    """Tells one state of a corpus from another: names, sizes and times of local files, the pinned name of a hub data set."""
    path = Path(corpus).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    seen = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps([corpus, seen]).encode()).hexdigest()[:16]


def public_name(source: str) -> str:
    """A source without the folders of this machine."""
    return Path(source).name if Path(source).expanduser().exists() else source


def as_recorded(p: Profile) -> dict:
    """A profile as records of runs hold it."""
    return asdict(p) | {
        k: public_name(getattr(p, k)) for k in ("model", "corpus", "ngram_corpus", "published")
    }


def rehearsal(p: Profile, share: str) -> Profile:
    """The profile with a share of its token budgets, a batch at the least."""
    if not 0 < float(share) <= 1:
        raise ValueError(
            f"TSAE_BUDGET={share} must be a share of the profile's tokens, above 0 and at most 1"
        )
    names = [
        f.name for f in fields(Profile) if f.name.endswith("tokens") and f.name != "buffer_tokens"
    ]
    less = {n: max(p.batch_size, int(float(share) * getattr(p, n))) for n in names}
    return replace(
        p,
        **less,
        budgets=tuple(
            max((i + 1) * p.batch_size, int(float(share) * b)) for i, b in enumerate(p.budgets)
        ),
    )


def settings(profile: str) -> tuple[Profile, Path]:
    """A profile as the environment changes it, and the folder of its figures."""
    if profile not in PROFILES:
        raise ValueError(
            f"unknown profile {profile!r}: TSAE_PROFILE must be one of {', '.join(PROFILES)}"
        )
    own = {
        k: os.environ[v]
        for k in ("model", "corpus", "ngram_corpus", "published")
        if os.environ.get(v := f"TSAE_{k.upper()}")
    }
    own = (
        ({"ngram_corpus": ""} if "corpus" in own else {})
        | ({"published": ""} if "model" in own else {})
        | own
    )
    p = replace(
        PROFILES[profile], **own, gib=float(os.environ.get("TSAE_GIB") or PROFILES[profile].gib)
    )
    name = f"{profile}-{Path(tu.hub_name(p.model)[0]).name}" if own else profile
    if share := os.environ.get("TSAE_BUDGET"):
        p, name = rehearsal(p, share), f"{name}-x{share}"
    return p, Path(os.environ.get("TSAE_FIGURES") or ROOT / "figures") / name


class Lab:
    """The bench of one notebook. `Lab("fig6_pareto", "mini")` loads nothing until asked.

    Environment: TSAE_MODEL, TSAE_CORPUS, TSAE_NGRAM_CORPUS and TSAE_PUBLISHED replace the profile's model, corpus, corpus of figure 1
    and published SAEs (without the last two a corpus of one's own serves figure 1 too, and a model of one's own has no
    published SAEs), TSAE_FIGURES moves the output, TSAE_CACHE the trained SAEs, TSAE_GIB bounds the memory of SAEs in training,
    TSAE_BUDGET=0.001 takes that share of all token budgets, for a rehearsal. Raises ValueError for an unknown profile or a
    budget that is no share, FileNotFoundError for a missing model.
    """

    def __init__(self, figure_id: str, profile: str) -> None:
        self.id, self.started = figure_id, time.time()
        self.p, self.out = settings(profile)
        self.cache = testbed_corpus.cache_folder()
        self.claims: dict[str, dict] = {}
        self._published: dict[int, tu.TSAE] = {}
        torch.manual_seed(0)
        plt.style.use(ROOT / "figures" / "tsae.mplstyle")
        what = f"{figure_id}: profile {profile}, model {self.p.model}, corpus {self.p.corpus}"
        what += f", published SAEs {self.p.published}" if self.p.published else ""
        print(f"{what}, {torch.get_num_threads()} threads")

    # -- model and text --

    @cached_property
    def lm(self) -> tu.LanguageModel:
        lm = tu.load_lm(ROOT / "testbed" / "model" if self.p.model == "testbed" else self.p.model)
        if lm.bos_note:
            print(lm.bos_note)
        return lm

    @cached_property
    def model_name(self) -> str:
        return Path(tu.hub_name(self.p.model)[0]).name

    @property
    def corpus_name(self) -> str:
        return (
            "software documentation" if self.p.corpus == "testbed" else public_name(self.p.corpus)
        )

    @cached_property
    def weights_sha256(self) -> str:
        """Of the model's file of weights, to compare with the hub's; empty where there are several."""
        name, revision = tu.hub_name(self.lm.name)
        file = "model.safetensors"
        found = (
            Path(name, file)
            if Path(name).is_dir()
            else try_to_load_from_cache(name, file, revision=revision)
        )
        if not isinstance(found, str | Path) or not Path(found).exists():
            return ""
        with open(found, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @cached_property
    def context_size(self) -> int:
        return min(
            self.p.context_size,
            getattr(self.lm.model.config, "max_position_embeddings", self.p.context_size),
        )

    @cached_property
    def layer(self) -> int:
        return int(self.p.depth * self.lm.n_layers + 1e-9)

    @cached_property
    def layers(self) -> list[int]:
        """Early, middle and late."""
        return sorted({int(d * self.lm.n_layers + 1e-9) for d in self.p.depths})

    @staticmethod
    def hook(layer: int) -> str:
        return f"blocks.{layer}.hook_resid_pre"

    @cached_property
    def corpus_hash(self) -> str:
        if self.p.corpus == "testbed":
            manifest = testbed_corpus.load()[1]
            if manifest["missing"]:
                print(f"corpus without {', '.join(manifest['missing'])}: not installed here")
            record = ROOT / "figures" / "record" / f"{self.id}.json"
            if (
                record.exists()
                and json.loads(record.read_text())["corpus_hash"] != manifest["hash"]
            ):
                print(
                    "note: the documentation installed here is not the committed record's (other versions): numbers will differ a little"
                )
            return manifest["hash"]
        return corpus_key(self.p.corpus)

    def documents(self, split: str, corpus: str = "") -> Iterator[str]:
        """Texts of one split: lm, sae, tune, heldout. Another corpus than the testbed's is split by the position of a document
        (sae 80 %, tune 5 %, heldout 15 %) and has no lm split."""
        corpus = corpus or self.p.corpus
        if corpus == "testbed":
            yield from (d.text for d in testbed_corpus.documents(split))
            return
        for i, text in enumerate(tu.read_documents(corpus)):
            u = int.from_bytes(hashlib.sha256(str(i).encode()).digest()[:4], "big") / 2**32
            if split == ("sae" if u < 0.8 else "tune" if u < 0.85 else "heldout"):
                yield text

    def rows(self, split: str, tokens: float, corpus: str = "") -> torch.Tensor:
        """Token rows [R, L] of a split, about `tokens` of them. Those of another corpus than the testbed's are cached on disk.

        Rows are evenly spaced over what is read: documents may come in the order of their packages, so the beginning is no
        sample. Of a local corpus at most eight times as much is read, of a hub corpus no more than is wanted.
        """
        corpus = corpus or self.p.corpus
        if corpus == "testbed":
            return self._read_rows(split, tokens, corpus, np.inf)
        vocabulary = hashlib.sha256(
            json.dumps(sorted(self.lm.tokenizer.get_vocab().items())).encode()
        ).hexdigest()
        key = [
            corpus_key(corpus),
            split,
            int(tokens),
            self.context_size,
            vocabulary,
            self.lm.bos_id,
            self.lm.separator_id,
        ]
        path = (
            self.cache
            / f"rows-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.safetensors"
        )
        if not path.exists():
            local = Path(corpus).expanduser().exists()
            save_atomically(
                {"rows": self._read_rows(split, tokens, corpus, (8 if local else 1) * tokens)}, path
            )
        return load_file(path)["rows"]

    def _read_rows(self, split: str, tokens: float, corpus: str, limit: float) -> torch.Tensor:
        try:
            rows = tu.token_rows(
                self.documents(split, corpus),
                self.lm,
                self.context_size,
                max(limit, 2 * self.context_size),
                progress=corpus != "testbed" and tokens > 10**6,
            )
        except ValueError as error:
            raise ValueError(f"split {split!r} of {corpus}: {error}") from error
        wanted = max(2, int(tokens) // (self.context_size - 1))
        return (
            rows if wanted >= len(rows) else rows[torch.linspace(0, len(rows) - 1, wanted).long()]
        )

    @cached_property
    def train_rows(self) -> torch.Tensor:
        rows = self.rows("sae", 1.1 * self.p.tokens)
        print(f"training rows: {rows.numel():,} tokens; a longer run repeats them in another order")
        return rows

    # -- SAEs --

    @property
    def d_sae(self) -> int:
        return self.p.expansion * self.lm.d_model

    def lr(self, system: str) -> float:
        """The profile's learning rate for a system, for notebooks without a search of their own."""
        return self.p.tsae_lr if "lookup" in system else self.p.sae_lr

    @property
    def paper_sae(self) -> str:
        """The system that stands for the paper's SAE where the paper measured RES-JB."""
        return "published" if self.p.published else "topk"

    def published(self, layer: int) -> dict[str, tu.TSAE]:
        """{"published": SAE} of a layer, {} where the profile names none. Raises ValueError where it does not fit the model."""
        if self.p.published and layer not in self._published:
            name, revision = tu.hub_name(self.p.published)
            sae = interop.from_pretrained(name, self.hook(layer), revision)
            print(
                f"published SAE: {public_name(name)}, {self.hook(layer)}, {sae.cfg.d_sae:,} features, context {sae.cfg.context_size}"
            )
            rows = self.rows("heldout", 8 * self.context_size)[:, : max(2, sae.cfg.context_size)]
            self._published[layer] = interop.check_fit(sae, self.lm, rows)
        return {"published": self._published[layer]} if self.p.published else {}

    @cached_property
    def study_context(self) -> int:
        """Positions of a row on which features are studied: those that a published SAE was trained on, else all."""
        trained = [
            sae.cfg.context_size
            for sae in self.published(self.layer).values()
            if sae.cfg.context_size > 1
        ]
        return min([self.context_size, *trained])

    def unigrams(self, layer: int) -> torch.Tensor:
        """A([BOS, t])_1 of every token [V, D], cached on disk."""
        path = (
            self.cache
            / f"unigrams-{self.lm.fingerprint}-{layer}{'' if self.lm.bf16 else '-fp32'}.safetensors"
        )
        if not path.exists():
            save_atomically(
                {"unigrams": tu.unigram_activations(self.lm, self.hook(layer), progress=True)}, path
            )
        return load_file(path)["unigrams"].to(self.lm.device)

    def token_means(self, layer: int) -> torch.Tensor:
        """Mean activation of every token over a million training tokens [V, D]; the mean of all for tokens not seen."""
        n = min(len(self.train_rows), max(2, 10**6 // self.context_size))
        ids = self.train_rows[torch.linspace(0, len(self.train_rows) - 1, n).long()].long()
        total, count = torch.zeros(self.lm.n_vocab, self.lm.d_model), torch.zeros(self.lm.n_vocab)
        for part in ids.split(32):
            keep = tu.keep_mask(part, self.lm)
            total.index_add_(
                0,
                part[keep],
                self.lm.activations(part, [layer])[layer][keep.to(self.lm.device)].cpu(),
            )
            count += torch.bincount(part[keep], minlength=self.lm.n_vocab)
        mean = total.sum(0) / count.sum()
        return torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], mean).to(
            self.lm.device
        )

    def _new_sae(self, arm: Arm, layer: int, seed: int) -> tu.TSAE:
        cfg = tu.TSAEConfig(
            d_in=self.lm.d_model,
            d_sae=arm.d_sae,
            activation=arm.activation,
            k=arm.k,
            seed=seed,
            l1_coefficient=arm.l1_coefficient,
            encoder_scale=arm.encoder_scale,
            model_name=self.model_name,
            hook_name=self.hook(layer),
            context_size=self.context_size,
        )
        if not arm.start:
            return tu.TSAE(cfg).to(self.lm.device)
        table = self.token_means(layer) if arm.start == "mean" else self.unigrams(layer)
        if arm.start == "shuffled":
            table = table[
                torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).to(
                    table.device
                )
            ]
        scale = 0.0 if arm.start == "zero" else arm.table_scale
        return tu.TSAE(cfg, tu.TokenLookup(scale * table, trainable=not arm.frozen)).to(
            self.lm.device
        )

    def train_or_load(
        self, arms: dict[str, Arm], layer: int, seed: int, tokens: int
    ) -> dict[str, tu.TSAE]:
        """Trained SAEs by name. What the cache lacks is trained in one pass of the language model (in several where the
        profile's `gib` would not hold it), then saved.

        Each SAE carries `record`: its dead fraction, seconds and the tokens it saw.
        """

        def folder(arm: Arm) -> Path:
            own = {
                f.name: getattr(arm, f.name)
                for f in fields(Arm)
                if getattr(arm, f.name) != f.default
            }  # a new field changes no key
            key = [
                CACHE_VERSION.get(arm.activation, 3),
                own,
                layer,
                seed,
                tokens,
                self.p.batch_size,
                self.p.buffer_tokens,
                self.lm.fingerprint,
                self.lm.bf16,
                rows,
                *[self.p.lr_end] * (self.p.lr_end > 0),
            ]
            return self.cache / "saes" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]

        rows = hashlib.sha256(self.train_rows.numpy().tobytes()).hexdigest()

        with lock(self.cache / "saes" / f"{self.model_name}-{layer}-{seed}.lock"):
            for part in self._passes({n: a for n, a in arms.items() if not folder(a).exists()}):
                saes = {n: self._new_sae(a, layer, seed) for n, a in part.items()}
                window = min(tu.TrainConfig().dead_window, tokens // 4)
                cfgs = {
                    n: tu.TrainConfig(
                        tokens=tokens,
                        lr=a.lr,
                        lr_lookup=a.lr_lookup,
                        lr_end=self.p.lr_end,
                        start_l0=a.start_l0,
                        aux_k=a.aux_k,
                        aux_window=window // 5,
                        dead_window=window,
                    )
                    for n, a in part.items()
                }
                stream = tu.ActivationStream(
                    self.lm,
                    self.train_rows,
                    self.hook(layer),
                    self.p.batch_size,
                    self.p.buffer_tokens,
                    seed,
                )
                measured, after_step = self._measure_on_the_way(part, saes, layer, tokens)
                history = tu.train(saes, stream, cfgs, after_step=after_step)
                for name, sae in saes.items():
                    own = [
                        {k: v for k, v in row.items() if k != "system"}
                        for row in history
                        if row["system"] == name
                    ]
                    record = {
                        **own[-1],
                        "dead_window": window,
                        "arm": asdict(part[name]),
                        "history": own,
                        "curve": measured[name],
                        "pass": {"saes": len(part), "seconds_in_model": stream.seconds},
                    }
                    tu.save(sae, folder(part[name]), {"record": record})
        loaded = {}
        for name, arm in arms.items():
            loaded[name] = tu.load(folder(arm), self.lm.device)
            loaded[name].record = tu.read_cfg(folder(arm))["metadata"]["tokenized"]["record"]
        return loaded

    def _passes(self, arms: dict[str, Arm]) -> list[dict[str, Arm]]:
        """The arms in groups that fit into the profile's `gib` together, one arm at least; says what each group takes."""
        groups, free, most = [], 0.0, 0.0
        for name, arm in arms.items():
            table = bool(arm.start) * self.lm.n_vocab * self.lm.d_model
            parameters = arm.d_sae * (2 * self.lm.d_model + 1) + table
            gib = (
                16 * parameters + 4 * table * (arm.curve > 0)
            ) / 2**30  # fp32 weights, gradients, Adam's two; a curve keeps the start
            if not groups or gib > free:
                groups, free = [*groups, {}], self.p.gib
            groups[-1][name], free = arm, free - gib
            most = max(most, self.p.gib - free)
        if groups:
            print(
                f"training {len(arms)} SAEs in {len(groups)} pass(es) of the language model, {most:.2f} GiB with Adam and gradients"
            )
        return groups

    def _measure_on_the_way(
        self, arms: dict[str, Arm], saes: dict[str, tu.TSAE], layer: int, tokens: int
    ):
        """(rows by SAE, after_step for `train`): held-out measurements of the arms with `curve` at logarithmically spaced steps."""
        rows, wanted = {n: [] for n in arms}, {n: a.curve for n, a in arms.items() if a.curve}
        if not wanted:
            return rows, None
        steps = max(1, tokens // self.p.batch_size)
        at = {int(s) for s in np.geomspace(1, steps, self.p.curve_points).round()}
        evaluator = tu.Evaluator(
            self.lm, self.rows("heldout", max(wanted.values())), self.hook(layer)
        )
        tables = {
            n: saes[n].lookup.W.detach().clone() for n in wanted if saes[n].lookup is not None
        }

        def measure(step: int) -> None:
            for n in wanted:
                row = {"step": step, "tokens": step * self.p.batch_size, **evaluator(saes[n])}
                if n in tables:  # mean over the vocabulary
                    row["table_cosine"] = (
                        torch.cosine_similarity(saes[n].lookup.W.detach(), tables[n], dim=-1)
                        .mean()
                        .item()
                    )
                rows[n].append(row)

        measure(0)  # before the first step: initialisation may already win
        return rows, lambda step: measure(step + 1) if step + 1 in at else None

    def committed_saes(self) -> dict[str, tu.TSAE]:
        """The trained pair of the repository; on a model other than the testbed a pair is trained instead."""
        folders = {name: ROOT / "testbed" / "saes" / name for name in ("topk", "topk+lookup")}
        if all(
            f.exists()
            and tu.read_cfg(f)["metadata"]["tokenized"]["model_hash"] == self.lm.fingerprint
            for f in folders.values()
        ):
            return {name: tu.load(f, self.lm.device) for name, f in folders.items()}
        print("no trained pair for this model in the repository: training one")
        arms = {
            s: Arm(s, self.d_sae, self.p.k, self.lr(s), **t)
            for s, t in (("topk", {}), ("topk+lookup", LOOKUP))
        }
        return self.train_or_load(arms, self.layer, self.p.seeds[0], self.p.tokens)

    # -- what a notebook leaves behind --

    def _write(self, name: str, text: str) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        partial = self.out / f".{name}.{os.getpid()}.partial"
        partial.write_text(text)
        return partial.replace(self.out / name)

    def save_text(self, text: str, suffix: str) -> Path:
        """Write <id><suffix>, such as a page, and return where it is."""
        return self._write(f"{self.id}{suffix}", text)

    def save_csv(self, table: pd.DataFrame, suffix: str = "") -> pd.DataFrame:
        """Write <id><suffix>.csv and, beside the main one, <id>.json: what was run, on what."""
        self._write(f"{self.id}{suffix}.csv", table.to_csv(index=False, float_format="%.6g"))
        if not suffix:
            meta = {
                "id": self.id,
                "profile": as_recorded(self.p),
                "model": self.model_name,
                "model_hash": self.lm.fingerprint,
                "weights_sha256": self.weights_sha256,
                "corpus_hash": self.corpus_hash,
                "torch": torch.__version__.split("+")[0],
                "device": str(self.lm.device),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
                "seconds": round(time.time() - self.started),
            }
            self._write(f"{self.id}.json", json.dumps(meta, indent=1) + "\n")
        return self.read_csv(suffix)

    def read_csv(self, suffix: str = "") -> pd.DataFrame:
        """The table as saved: figures are drawn from this."""
        path = self.out / f"{self.id}{suffix}.csv"
        if not path.exists():
            raise FileNotFoundError(
                f"{path.name} is not in {path.parent}: run this notebook once before redrawing"
            )
        return pd.read_csv(
            path, keep_default_na=False, na_values=[""]
        )  # "None" and "null" are tokens

    def savefig(self, figure: plt.Figure, suffix: str = "") -> None:
        """Write <id><suffix>.png and .pdf."""
        self.out.mkdir(parents=True, exist_ok=True)
        for kind in ("png", "pdf"):
            figure.savefig(
                self.out / f"{self.id}{suffix}.{kind}",
                metadata={"CreationDate": None} if kind == "pdf" else {"Software": None},
            )

    def paper(self, figure: str) -> pd.DataFrame:
        """The paper's values for one figure, from notebooks/paper_numbers.csv (provenance in its `source` column)."""
        numbers = pd.read_csv(ROOT / "notebooks" / "paper_numbers.csv")
        return numbers[numbers.figure == figure].apply(
            lambda c: pd.to_numeric(c) if c.astype(str).str.fullmatch(r"-?[\d.]+").all() else c
        )

    def declare(self, id: str, claim: str, source: str, rule: str, paper: str) -> None:
        """State a claim and its decision rule. Called before the run."""
        self.claims[id] = {"id": id, "claim": claim, "source": source, "rule": rule, "paper": paper}

    def verdict(
        self, id: str, ours: str, holds: bool | None, n_seeds: int = 1, direction: bool = False
    ) -> str:
        """Judge a declared claim: `holds` by its rule, None where it could not be tested here.

        `direction`: the rule fails but the sign is the paper's (told apart at the paper's own settings only).
        """
        if self.p in [replace(PROFILES[name], gib=self.p.gib) for name in PAPER_PROFILES]:
            word = "reproduced" if holds else "direction only" if direction else "not reproduced"
        else:
            word = "effect present" if holds else "effect absent"
        word = "not tested" if holds is None else word
        self.claims[id] |= {
            "ours": ours,
            "n_seeds": n_seeds,
            "model": self.model_name,
            "verdict": word,
        }
        return word

    def save_claims(self) -> pd.DataFrame:
        """Write <id>_claims.csv. Raises RuntimeError for a claim that was declared and never judged."""
        if open_ := [c for c, row in self.claims.items() if "verdict" not in row]:
            raise RuntimeError(f"declared but not judged: {', '.join(open_)}")
        columns = ["id", "claim", "source", "rule", "paper", "ours", "n_seeds", "model", "verdict"]
        return self.save_csv(pd.DataFrame(self.claims.values())[columns], "_claims")


def scorecard(claims: pd.DataFrame) -> str:
    """The claims as the Markdown table that the README shows."""
    lines = ["| claim | source | paper | ours | seeds | verdict |", "|---|---|---|---|---|---|"]
    for row in claims.astype(str).to_dict("records"):
        cells = [
            row["claim"],
            row["source"],
            row["paper"],
            row["ours"],
            row["n_seeds"],
            f"**{row['verdict']}**",
        ]
        lines.append("| " + " | ".join(c.replace("|", "/") for c in cells) + " |")
    return "\n".join(lines)
