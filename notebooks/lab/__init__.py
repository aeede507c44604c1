"""What the notebooks share.

lab = Lab("fig6_pareto", PROFILE)                       # model, text and output of a notebook
lab.declare()                                           # its claims and their rules
saes = lab.train_or_load(specs, lab.layer, seed, tokens)
df = lab.run(measure)                                   # trains and measures, or redraws
lab.judge()                                             # every claim, by notebooks/rules/<id>.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

# isort: off
from . import text_progress  # noqa: F401 (must precede everything that imports tqdm.auto)
# isort: on

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import Markdown, display
from transformers.utils import logging as transformers_logging

import tsae_utils as tu
from testbed import corpus as testbed_corpus
from tsae.documents import Document
from tsae.stream import max_norm_of

from . import claims, data, results, store, training
from .profiles import PROFILES, ROOT, Profile, is_papers_setting, public_name, settings
from .stats import Interval, bootstrap_interval, paired_interval
from .store import with_documents
from .style import PALETTE, SYSTEMS, label_lines, lines, plain_log
from .training import HALF, LOOKUP, SAESpec

__all__ = [
    "HALF",
    "LOOKUP",
    "PALETTE",
    "PROFILES",
    "ROOT",
    "SYSTEMS",
    "Interval",
    "Lab",
    "Profile",
    "SAESpec",
    "bootstrap_interval",
    "label_lines",
    "lines",
    "paired_interval",
    "plain_log",
    "tu",
    "with_documents",
]


class Lab:
    """The bench of one notebook; nothing is loaded before it is needed.

    `profiles.py` lists the environment variables. TSAE_CACHE moves the trained SAEs, and with
    TSAE_REPLAY set `run` reads the committed CSVs. Raises ValueError for an unknown profile.
    """

    def __init__(self, figure_id: str, profile: str) -> None:
        self.id, self.started = figure_id, time.time()
        self.p, self.out = settings(profile)
        self.cache = testbed_corpus.cache_folder()
        self.replay = bool(os.environ.get("TSAE_REPLAY"))
        self.claims: dict[str, dict] = {}
        self.published_saes: dict[int, tu.TSAE] = {}
        self.max_norms: dict[int, float] = {}
        self.store: store.Store | None = None
        self.looks_at_final = False
        self.starts: dict[tuple[str, int], torch.Tensor] = {}  # means cost a pass of the model
        os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # nothing is sent anywhere
        torch.manual_seed(0)
        tu.keep_freed_memory()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        plt.style.use(ROOT / "figures" / "tsae.mplstyle")
        source = self.p.source
        what = f"{figure_id}: profile {profile}, model {source.model}, corpus {source.corpus}"
        if source.published:
            what += f", published SAEs {source.published}"
        print(f"{what}, {torch.get_num_threads()} threads")

    # -- model and text --

    @cached_property
    def lm(self) -> tu.LanguageModel:
        return data.load_language_model(self.p.source.model)

    @cached_property
    def model_name(self) -> str:
        return Path(tu.hub_name(self.p.source.model)[0]).name

    @property
    def corpus_name(self) -> str:
        corpus = self.p.source.corpus
        return "software documentation" if corpus == "testbed" else public_name(corpus)

    @cached_property
    def weights_sha256(self) -> str:
        return data.weights_sha256(self.lm)

    @cached_property
    def corpus_hash(self) -> str:
        return data.corpus_hash(self.p.source.corpus, self.id)

    @cached_property
    def context_size(self) -> int:
        wanted = self.p.source.context_size
        return min(wanted, self.lm.max_context or wanted)

    def layer_at(self, depth: float) -> int:
        """The layer at a share of the model's depth."""
        return int(depth * self.lm.n_layers + 1e-9)

    @cached_property
    def layer(self) -> int:
        """The main layer."""
        return self.layer_at(self.p.grid.depth)

    @cached_property
    def layers(self) -> list[int]:
        """Early, middle and late."""
        return sorted({self.layer_at(d) for d in self.p.grid.depths})

    @staticmethod
    def hook(layer: int) -> str:
        """Name of the hook point entering a layer."""
        return f"blocks.{layer}.hook_resid_pre"

    def documents(self, split: str, corpus: str = "") -> Iterator[Document]:
        """Texts of one split: lm (testbed only), sae, tune, heldout or final."""
        return data.documents(corpus or self.p.source.corpus, split)

    def rows(self, split: str, tokens: float, corpus: str = "") -> torch.Tensor:
        """Token rows [R, L] of a split, evenly spaced, about `tokens` tokens in all.

        No decision may touch the split `final`: figures/<profile>/final_looks.csv counts the looks.
        """
        if split == "final":
            self.looks_at_final = True
        return data.rows(self, split, tokens, corpus or self.p.source.corpus)

    @cached_property
    def train_rows(self) -> torch.Tensor:
        """Rows on which SAEs train."""
        rows = self.rows("sae", 1.1 * self.p.budget.tokens)
        print(f"training rows: {rows.numel():,} tokens; longer runs repeat them in another order")
        return rows

    def unigrams(self, layer: int) -> torch.Tensor:
        """A([BOS, t])_1 of every token [V, D]."""
        return data.unigrams(self, layer)

    def table_start(self, kind: str, layer: int) -> torch.Tensor:
        """Rows where tables start [V, D]: "unigram", or "mean" over training text."""
        if (kind, layer) not in self.starts:
            self.starts[kind, layer] = data.table_start(self, kind, layer)
        return self.starts[kind, layer]

    def max_norm(self, layer: int) -> float:
        """The norm above which activations are massive, and left alone."""
        if layer not in self.max_norms:
            self.max_norms[layer] = max_norm_of(self.lm, self.train_rows, self.hook(layer))
        return self.max_norms[layer]

    # -- SAEs --

    @property
    def d_sae(self) -> int:
        """The main width."""
        return self.p.grid.expansion * self.lm.d_model

    def lr(self, system: str) -> float:
        """The profile's learning rate, for notebooks without a search of their own."""
        return self.p.recipe.tsae_lr if "lookup" in system else self.p.recipe.sae_lr

    def train_or_load(
        self, specs: dict[str, SAESpec], layer: int, seed: int, tokens: int
    ) -> dict[str, tu.TSAE]:
        """Trained SAEs by name, each with its training `record`; cached by their configuration."""
        return training.train_or_load(self, specs, layer, seed, tokens)

    @property
    def paper_sae(self) -> str:
        """The system that stands for the paper's SAE."""
        return "published" if self.p.source.published else "topk"

    def published(self, layer: int) -> dict[str, tu.TSAE]:
        """{"published": SAE} of a layer; empty where the profile names none.

        Raises ValueError where it does not fit the model.
        """
        if not self.p.source.published:
            return {}
        if layer not in self.published_saes:
            name, revision = tu.hub_name(self.p.source.published)
            sae = tu.from_pretrained(name, self.hook(layer), revision)
            where = f"{public_name(name)}, {self.hook(layer)}"
            print(f"published SAE: {where}, {sae.cfg.d_sae:,} features")
            rows = self.rows("heldout", 8 * self.context_size)[:, : max(2, sae.cfg.context_size)]
            self.published_saes[layer] = tu.check_fit(sae, self.lm, rows)
        return {"published": self.published_saes[layer]}

    @cached_property
    def study_context(self) -> int:
        """Positions of a row on which features are studied: those every SAE was trained on."""
        trained = [sae.cfg.context_size for sae in self.published(self.layer).values()]
        return min([self.context_size, *(size for size in trained if size > 1)])

    def committed_saes(self) -> dict[str, tu.TSAE]:
        """The trained pair of the repository; for another model a pair is trained instead."""
        folders = {name: ROOT / "testbed" / "saes" / name for name in ("topk", "topk+lookup")}
        hashes = {
            tu.read_cfg(f)["metadata"]["tokenized"]["model_hash"]
            for f in folders.values()
            if f.exists()
        }
        if hashes == {self.lm.fingerprint}:
            return {name: tu.load(f, self.lm.device) for name, f in folders.items()}
        print("the repository has no trained pair for this model: training one")
        k, tokens = self.p.grid.k, self.p.budget.tokens
        specs = {
            "topk": SAESpec("topk", self.d_sae, k, self.lr("topk")),
            "topk+lookup": SAESpec("topk+lookup", self.d_sae, k, self.lr("topk+lookup"), **LOOKUP),
        }
        return self.train_or_load(specs, self.layer, self.p.grid.seeds[0], tokens)

    def measured(
        self,
        specs: dict[str, SAESpec],
        layer: int,
        seed: int,
        tokens: int,
        measure: Callable[[str, tu.TSAE], dict | list[dict]],
        what: str = "heldout",
    ) -> list[dict]:
        """Rows of `measure(name, sae)` for every SAE, each with hashes of its origin.

        Rows that a former run left are taken again; only what is missing is trained. `what` names
        the measurement where one notebook makes several. A row's "documents" are DocumentSums.
        """
        if self.store is None:
            self.store = store.Store(self.out, self.id)
        return store.measured(self, self.store, specs, layer, seed, tokens, measure, what)

    # -- results --

    def run(self, measure: Callable, *suffixes: str):
        """Train and measure: the tables of `measure()`, saved as <id><suffix>.csv and read back.

        `measure` returns a table, or one for each suffix; without suffixes the main table.
        """
        return results.run(self, measure, suffixes or ("",))

    def read_csv(self, suffix: str = "") -> pd.DataFrame:
        """A saved table. Raises FileNotFoundError where the notebook has not run."""
        return results.read_csv(self, suffix)

    def save_text(self, text: str, suffix: str) -> Path:
        """Write <id><suffix>, such as a page."""
        return results.write(self.out, f"{self.id}{suffix}", text)

    def savefig(self, figure: plt.Figure, title: str, suffix: str = "") -> None:
        """Write <id><suffix>.png and .pdf under a title that is a true sentence."""
        results.savefig(self, figure, title, suffix)

    def paper(self, figure: str) -> pd.DataFrame:
        """The paper's values for one figure."""
        return results.paper_numbers(figure)

    # -- claims --

    def declare(self) -> pd.io.formats.style.Styler:
        """The notebook's claims with their decision rules, from notebooks/claims/<id>.toml."""
        self.claims = claims.read_claims(self.id)
        table = pd.DataFrame(self.claims).T.rename_axis("id").reset_index()
        return table[["id", "claim", "rule", "paper"]].style.hide()

    def judge(self) -> pd.io.formats.style.Styler:
        """Judge every declared claim by its rule, from the saved tables; writes <id>_claims.csv.

        The rules are functions in notebooks/rules/<id>.py.
        """
        if self.store is not None:
            self.store.finish(results.configs(self))
        tables, rules = claims.Tables(self.out, self.id), claims.rules_of(self.id)
        for id, claim in self.claims.items():
            claim |= claims.judged(claim, claims.find(rules[id], tables), is_papers_setting(self.p))
            claim["model"] = self.model_name
        table = pd.DataFrame(self.claims).T.rename_axis("id").reset_index()[claims.COLUMNS]
        table = table.astype(dict.fromkeys(("estimate", "low", "high"), float))
        results.save_csv(self, table, "_claims")
        return table[["id", "ours", "verdict"]].style.hide()

    def takeaway(self, text: str) -> None:
        """Show what came out and keep it: it is also the answer at the top of the notebook."""
        self.save_text(text + "\n", "_takeaway.md")
        display(Markdown(text))
