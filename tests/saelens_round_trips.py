"""Round trips with the real sae_lens, in an environment of its own: make saelens

What we save loads there and what is saved there loads here, with the same features and the same reconstruction. The
largest differences are written to benchmarks/results/saelens-round-trips.csv.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import sae_lens
import torch
from safetensors.torch import load_file

import tsae_utils as tu

D, F_, K = 24, 96, 5
HOOK = "blocks.8.hook_resid_pre"
RESULTS = (
    Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "saelens-round-trips.csv"
)
ROWS: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def results():
    yield
    if len(ROWS) < 25:  # some tests only (-k)
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROWS)


def x_BD() -> torch.Tensor:
    return torch.randn(200, D, generator=torch.Generator().manual_seed(7))


def randomise(module: torch.nn.Module) -> None:
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in module.named_parameters():
            t.add_(0.2 * torch.randn(t.shape, generator=g))
            if "threshold" in name:
                t.abs_()


def compare(direction: str, what: str, acts_a, acts_b, out_a, out_b) -> None:
    ROWS.append(
        {
            "direction": direction,
            "sae": what,
            "sae_lens": sae_lens.__version__,
            "largest_feature_difference": f"{(acts_a - acts_b).abs().max().item():.2g}",
            "largest_reconstruction_difference": f"{(out_a - out_b).abs().max().item():.2g}",
            "active_features_per_token": f"{(acts_a > 0).sum(-1).float().mean().item():.3g}",
        }
    )
    assert (
        (acts_a > 0).any()
        and torch.allclose(acts_a, acts_b, atol=1e-5)
        and torch.allclose(out_a, out_b, atol=1e-4)
    )


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "gated", "jumprelu"])
def test_ours_loads_there(tmp_path, activation, table):
    cfg = tu.TSAEConfig(
        d_in=D,
        d_sae=F_,
        activation=activation,
        k=K,
        model_name="gpt2",
        hook_name=HOOK,
        context_size=128,
    )
    sae = tu.TSAE(cfg, tu.TokenLookup(torch.randn(50, D)) if table else None).eval()
    x, tokens = x_BD(), torch.arange(200).remainder(50)[:, None]
    randomise(sae)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.2)
    folder = tu.save(sae, tmp_path / "s")
    theirs = sae_lens.SAE.load_from_disk(folder)
    with torch.no_grad():
        out = theirs(x)
        if table:  # from its own file
            out = out + load_file(folder / "token_lookup.safetensors")["W_lookup"][tokens[:, 0]]
        compare(
            "ours to sae_lens",
            activation + " with table" * table,
            sae.encode(x),
            theirs.encode(x),
            sae(x, tokens).x_hat,
            out,
        )
    assert theirs.cfg.metadata.hook_name == HOOK and theirs.cfg.metadata.context_size == 128


def theirs(kind: str, **changes):
    """A SAELens SAE for inference, weights random."""
    common = {"d_in": D, "d_sae": F_, "dtype": "float32", "device": "cpu", **changes}
    cls, cfg = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    }[kind]
    sae = cls(cfg(**common, **({"k": K} if kind == "topk" else {})))
    randomise(sae)
    return sae


@pytest.mark.parametrize("b_dec_on_input", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_theirs_loads_here(tmp_path, kind, b_dec_on_input):
    sae = theirs(kind, apply_b_dec_to_input=b_dec_on_input)
    sae.save_model(tmp_path / "s")
    same(sae, tmp_path / "s", kind + " with b_dec left on the input" * (not b_dec_on_input))


def same(sae, folder: Path, what: str) -> None:
    ours, x = tu.load(folder), x_BD()
    with torch.no_grad():
        compare(
            "sae_lens to ours",
            what,
            ours.encode(x),
            sae.encode(x),
            ours(x, torch.zeros(200, 1, dtype=torch.long)).x_hat,
            sae(x),
        )


def test_topk_scaled_by_decoder_norms_loads_here(tmp_path):
    sae = theirs("topk", rescale_acts_by_decoder_norm=True)
    sae.save_model(tmp_path / "s")
    same(sae, tmp_path / "s", "topk scaled by decoder norms")


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated", "BatchTopK"])
def test_trained_theirs_loads_here(tmp_path, kind):
    """What their training saves for inference."""
    more = {"k": K} if "TopK" in kind else {}
    cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(
        d_in=D, d_sae=F_, dtype="float32", device="cpu", **more
    )
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(cfg)
    randomise(sae)
    if kind == "BatchTopK":
        sae.topk_threshold.fill_(0.4)
    sae.save_inference_model(tmp_path / "s")
    same(sae_lens.SAE.load_from_disk(tmp_path / "s"), tmp_path / "s", f"trained {kind}")


def test_pre_6_keys_load_here_as_there(tmp_path):
    """RES-JB's layout: flat, hook_point, no architecture."""
    sae = theirs("standard")
    sae.save_model(tmp_path / "s")
    old = {
        "model_name": "gpt2-small",
        "hook_point": HOOK,
        "hook_point_layer": 8,
        "d_in": D,
        "d_sae": F_,
        "context_size": 128,
        "dtype": "torch.float32",
        "device": "cpu",
    }
    (tmp_path / "s" / "cfg.json").write_text(json.dumps(old))
    same(
        sae_lens.SAE.load_from_disk(tmp_path / "s"),
        tmp_path / "s",
        "standard, keys from before version 6",
    )
    assert tu.load(tmp_path / "s").cfg.hook_name == HOOK


def test_what_cannot_be_folded_is_refused(tmp_path):
    theirs("standard", normalize_activations="layer_norm").save_model(tmp_path / "s")
    with pytest.raises(ValueError, match="normalize_activations = 'layer_norm' is not supported"):
        tu.load(tmp_path / "s")


def test_fvu_is_one_less_their_explained_variance():
    """Their present definition, accumulated over batches; the older one (explained_variance_legacy) is another."""
    from sae_lens.evals import ExplainedVarianceCalculator

    x = x_BD() * torch.linspace(0.1, 3, D) + 5
    x_hat = x + 0.3 * torch.randn_like(x)
    theirs = ExplainedVarianceCalculator()
    for a, b in zip(x.split(64), x_hat.split(64), strict=True):
        theirs.add_batch(sae_output=b, hidden_acts=a)
    assert tu.reconstruction_error(x, x_hat).fvu == pytest.approx(
        1 - float(theirs.compute()), rel=1e-3
    )


def test_attach_to_a_hooked_transformer():
    """TransformerLens before version 4, which sae_lens needs: the same call works."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    import interop

    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=D,
            n_ctx=32,
            d_head=8,
            n_heads=3,
            d_mlp=48,
            d_vocab=50,
            act_fn="gelu_new",
            normalization_type="LN",
            seed=0,
        )
    )
    sae = tu.TSAE(
        tu.TSAEConfig(d_in=D, d_sae=F_, k=K, hook_name="blocks.1.hook_resid_pre"),
        tu.TokenLookup(torch.randn(50, D)),
    ).eval()
    randomise(sae)
    ids = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(0))

    def by_hand(x, hook):
        mean = x.mean(-1, keepdim=True)
        x_hat = sae((x - mean).flatten(0, 1), ids.flatten()[:, None]).x_hat.view(x.shape) + mean
        return torch.where((ids > 0)[..., None] & (torch.arange(10) > 0)[:, None], x_hat, x)

    with torch.no_grad(), interop.attach(model, sae) as seen:
        attached = model(ids)
    with torch.no_grad():
        expected, clean = (
            model.run_with_hooks(ids, fwd_hooks=[(sae.cfg.hook_name, by_hand)]),
            model(ids),
        )
    assert torch.allclose(attached, expected, atol=1e-4) and not torch.allclose(
        clean, expected, atol=1e-2
    )
    assert seen.acts.shape == (2, 10, F_)
