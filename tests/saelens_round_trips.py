"""Round trips with the real sae_lens, in an environment of its own: make test-saelens

    PYTHONPATH=. .venv-peers/bin/python -m pytest -q tests/saelens_round_trips.py

What we save loads there, and what is saved there loads here, with the same features and the same
reconstruction. The largest differences go to benchmarks/results/saelens-round-trips.csv.
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
from tsae.attach import attach

D_IN, D_SAE, K = 24, 96, 5
HOOK = "blocks.8.hook_resid_pre"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "saelens-round-trips.csv"
ROWS: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write the table at the end of a run of all tests."""
    yield
    if len(ROWS) < 25:  # a run of a few tests (-k)
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(ROWS)


def activations() -> torch.Tensor:
    return torch.randn(200, D_IN, generator=torch.Generator().manual_seed(7))


def randomize_(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            if "threshold" in name:
                parameter.abs_()


def compare(direction: str, name: str, acts: tuple, reconstructions: tuple) -> None:
    """Record how far two SAEs' activations and reconstructions differ, and check it."""
    features, other_features = acts
    x_hat, other_x_hat = reconstructions
    feature_difference = (features - other_features).abs().max().item()
    difference = (x_hat - other_x_hat).abs().max().item()
    active = (features > 0).sum(-1).float().mean().item()
    row = {
        "direction": direction,
        "sae": name,
        "sae_lens": sae_lens.__version__,
        "largest_feature_difference": f"{feature_difference:.2g}",
        "largest_reconstruction_difference": f"{difference:.2g}",
        "active_features_per_token": f"{active:.3g}",
    }
    ROWS.append(row)
    assert (features > 0).any()
    assert torch.allclose(features, other_features, atol=1e-5)
    assert torch.allclose(x_hat, other_x_hat, atol=1e-4)


def compare_loaded(sae, folder: Path, name: str) -> None:
    """Compare an SAE of sae_lens with what we load from its folder."""
    ours, x, tokens = tu.load(folder), activations(), torch.zeros(200, 1, dtype=torch.long)
    with torch.no_grad():
        acts = (ours.encode(x), sae.encode(x))
        compare("sae_lens to ours", name, acts, (ours(x, tokens).x_hat, sae(x)))


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "gated", "jumprelu"])
def test_ours_loads_there(tmp_path, activation, table):
    cfg = tu.TSAEConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        activation=activation,
        k=K,
        model_name="gpt2",
        hook_name=HOOK,
        context_size=128,
    )
    sae = tu.TSAE(cfg, tu.TokenLookup(torch.randn(50, D_IN)) if table else None).eval()
    x, tokens = activations(), torch.arange(200).remainder(50)[:, None]
    randomize_(sae)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.2)
    folder = tu.save(sae, tmp_path / "s")
    theirs = sae_lens.SAE.load_from_disk(folder)
    name = f"{activation} with table" if table else activation
    with torch.no_grad():
        x_hat = theirs(x)
        if table:  # sae_lens does not read the table's file
            W = load_file(folder / "token_lookup.safetensors")["W_lookup"]
            x_hat = x_hat + W[tokens[:, 0]]
        acts = (sae.encode(x), theirs.encode(x))
        compare("ours to sae_lens", name, acts, (sae(x, tokens).x_hat, x_hat))
    assert theirs.cfg.metadata.hook_name == HOOK
    assert theirs.cfg.metadata.context_size == 128


def their_sae(kind: str, **changes):
    """A SAE of sae_lens for inference, with random weights."""
    shape = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    if kind == "topk":
        shape["k"] = K
    classes = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    }
    sae_class, config_class = classes[kind]
    sae = sae_class(config_class(**shape, **changes))
    randomize_(sae)
    return sae


@pytest.mark.parametrize("b_dec_on_input", [True, False])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_theirs_loads_here(tmp_path, kind, b_dec_on_input):
    sae = their_sae(kind, apply_b_dec_to_input=b_dec_on_input)
    sae.save_model(tmp_path / "s")
    name = kind if b_dec_on_input else f"{kind} with b_dec left on the input"
    compare_loaded(sae, tmp_path / "s", name)


def test_topk_scaled_by_decoder_norms_loads_here(tmp_path):
    sae = their_sae("topk", rescale_acts_by_decoder_norm=True)
    sae.save_model(tmp_path / "s")
    compare_loaded(sae, tmp_path / "s", "topk scaled by decoder norms")


@pytest.mark.parametrize("kind", ["Standard", "TopK", "JumpReLU", "Gated", "BatchTopK"])
def test_what_their_training_saves_loads_here(tmp_path, kind):
    shape = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    if "TopK" in kind:
        shape["k"] = K
    cfg = getattr(sae_lens, f"{kind}TrainingSAEConfig")(**shape)
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(cfg)
    randomize_(sae)
    if kind == "BatchTopK":
        sae.topk_threshold.fill_(0.4)
    sae.save_inference_model(tmp_path / "s")
    inference = sae_lens.SAE.load_from_disk(tmp_path / "s")
    compare_loaded(inference, tmp_path / "s", f"trained {kind}")


def test_keys_from_before_version_6_load_here_as_there(tmp_path):
    """RES-JB's layout: flat, with hook_point and without an architecture."""
    folder = tmp_path / "s"
    their_sae("standard").save_model(folder)
    old = {
        "model_name": "gpt2-small",
        "hook_point": HOOK,
        "hook_point_layer": 8,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "context_size": 128,
        "dtype": "torch.float32",
        "device": "cpu",
    }
    (folder / "cfg.json").write_text(json.dumps(old))
    theirs = sae_lens.SAE.load_from_disk(folder)
    compare_loaded(theirs, folder, "standard, keys from before version 6")
    assert tu.load(folder).cfg.hook_name == HOOK


def test_what_cannot_be_folded_is_refused(tmp_path):
    their_sae("standard", normalize_activations="layer_norm").save_model(tmp_path / "s")
    with pytest.raises(ValueError, match="normalize_activations = 'layer_norm' is not supported"):
        tu.load(tmp_path / "s")


def test_fvu_is_one_minus_their_explained_variance():
    """Their present definition over batches; explained_variance_legacy is a different one."""
    from sae_lens.evals import ExplainedVarianceCalculator

    x = activations() * torch.linspace(0.1, 3, D_IN) + 5
    x_hat = x + 0.3 * torch.randn_like(x)
    calculator = ExplainedVarianceCalculator()
    for x_part, x_hat_part in zip(x.split(64), x_hat.split(64), strict=True):
        calculator.add_batch(sae_output=x_hat_part, hidden_acts=x_part)
    explained = float(calculator.compute())
    assert tu.reconstruction_error(x, x_hat).fvu == pytest.approx(1 - explained, rel=1e-3)


def test_attach_to_a_hooked_transformer():
    """The same call works for TransformerLens before version 4, which sae_lens needs."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 2, "d_model": D_IN, "n_ctx": 32, "d_head": 8, "n_heads": 3, "d_mlp": 48}
    kind = {"d_vocab": 50, "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0}
    model = HookedTransformer(HookedTransformerConfig(**shape, **kind))
    hook_name = "blocks.1.hook_resid_pre"
    cfg = tu.TSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, hook_name=hook_name)
    sae = tu.TSAE(cfg, tu.TokenLookup(torch.randn(50, D_IN))).eval()
    randomize_(sae)
    ids = torch.randint(50, (2, 10), generator=torch.Generator().manual_seed(0))

    def replace(stream, hook):
        mean = stream.mean(-1, keepdim=True)
        x_BD, tokens_BN = (stream - mean).flatten(0, 1), ids.flatten()[:, None]
        x_hat = sae(x_BD, tokens_BN).x_hat.view(stream.shape) + mean
        keep = (ids > 0) & (torch.arange(10) > 0)
        return torch.where(keep[..., None], x_hat, stream)

    with torch.no_grad():
        with attach(model, sae) as seen:
            attached = model(ids)
        expected = model.run_with_hooks(ids, fwd_hooks=[(hook_name, replace)])
        clean = model(ids)
    assert torch.allclose(attached, expected, atol=1e-4)
    assert not torch.allclose(clean, expected, atol=1e-2)
    assert seen.acts.shape == (2, 10, D_SAE)
