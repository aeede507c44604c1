"""Round trips with the real sae_lens, in an environment of its own: make test-saelens

    PYTHONPATH=. .venv-peers/bin/python -m pytest -q tests/saelens_round_trips.py

What we save loads there, and what is saved there loads here, with the same features and the same
reconstruction, tables included. Models that SAELens runs on a TSAE give the same losses as ours.
The largest differences go to benchmarks/results/saelens-round-trips.csv.
"""

from __future__ import annotations

import copy
import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sae_lens
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch.nn import functional
from transformer_lens import HookedTransformerConfig
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import tsae_utils as tu
from conftest import HOOK as SMALL_HOOK
from conftest import VOCAB, random_weights_sae
from tsae.attach import attach
from tsae.saelens_classes import WithTable, tokens_from

D_IN, D_SAE, K = 24, 96, 5
HOOK = "blocks.8.hook_resid_pre"
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "saelens-round-trips.csv"
COLUMNS = (
    "direction",
    "sae",
    "sae_lens",
    "largest_feature_difference",
    "largest_reconstruction_difference",
    "active_features_per_token",
    "largest_loss_difference",
)
ROWS: list[dict] = []


@pytest.fixture(scope="module", autouse=True)
def results():
    """Write the table at the end of a run of all tests."""
    yield
    if len(ROWS) < 61:  # a run of a few tests (-k)
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
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


KINDS = ["topk", "batchtopk", "relu", "gated", "jumprelu"]


FORMS = ["", "with table", "with table subtracted"]


def our_sae(activation: str, form: str = "with table") -> tu.TSAE:
    """A TSAE of either form with random weights, or an SAE without a table."""
    shape = {"d_in": D_IN, "d_sae": D_SAE, "activation": activation, "k": K}
    origin = {"model_name": "gpt2", "hook_name": HOOK, "context_size": 128}
    origin["subtract_lookup"] = form.endswith("subtracted")
    lookup = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(5))
    sae = tu.TSAE(tu.TSAEConfig(**shape, **origin), tu.TokenLookup(lookup) if form else None)
    randomize_(sae)
    if hasattr(sae, "threshold"):
        sae.threshold.fill_(0.2)
    return sae.eval()


def edit_cfg(folder: Path, **changes) -> None:
    """Change keys of a folder's cfg.json."""
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def equal(sae: tu.TSAE, other: tu.TSAE) -> bool:
    """Whether two TSAEs have the same configuration and the same tensors."""
    tensors, others = sae.state_dict(), other.state_dict()
    same = all(torch.equal(tensors[name], others[name]) for name in tensors)
    return same and tensors.keys() == others.keys() and sae.cfg == other.cfg


# -- a folder of ours in SAELens --


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", KINDS)
def test_ours_loads_there(tmp_path, activation, form):
    sae, x, tokens = our_sae(activation, form), activations(), torch.arange(200).remainder(50)
    theirs = sae_lens.SAE.load_from_disk(tu.save(sae, tmp_path / "s"))
    name, given = f"{activation} {form}".strip(), [tokens] if form else []
    with torch.no_grad():
        acts = theirs.encode(x, *given) if form.endswith("subtracted") else theirs.encode(x)
        x_hat = theirs.decode(acts, *given)
        acts = (sae.encode(x, tokens), acts)
        compare("ours to sae_lens", name, acts, (sae(x, tokens).x_hat, x_hat))
    assert theirs.cfg.metadata.hook_name == HOOK
    assert theirs.cfg.metadata.context_size == 128
    prefix = {"": "", "with table": "tokenized_", "with table subtracted": "subtracted_"}[form]
    assert theirs.cfg.architecture().rpartition("_")[0] == prefix[:-1]
    assert isinstance(theirs, WithTable) == bool(form)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", KINDS)
def test_what_sae_lens_saves_again_loads_here(tmp_path, activation, dtype, form):
    """Equal to the bit, metadata too; the weight file keeps to SAELens's tensors."""
    folder = tu.save(our_sae(activation, form), tmp_path / "s", {"note": "kept"}, dtype=dtype)
    sae_lens.SAE.load_from_disk(folder).save_model(tmp_path / "t")
    assert equal(tu.load(tmp_path / "t"), tu.load(folder))
    assert tu.read_cfg(tmp_path / "t")["metadata"]["tokenized"]["note"] == "kept"
    for file in ("sae_weights.safetensors", "token_lookup.safetensors"):
        tensors, again = load_file(folder / file), load_file(tmp_path / "t" / file)
        assert {n: t.dtype for n, t in again.items()} == {n: t.dtype for n, t in tensors.items()}
    assert "W_lookup" not in load_file(tmp_path / "t" / "sae_weights.safetensors")


def test_a_tsae_in_three_dimensions_and_copied(tmp_path):
    """Tokens [R, L] for activations [R, L, F]; copies keep the table."""
    folder = tu.save(our_sae("topk"), tmp_path / "s")
    theirs = sae_lens.SAE.load_from_disk(folder)
    x, tokens = activations(), torch.arange(200).remainder(50)
    with torch.no_grad():
        flat = theirs.decode(theirs.encode(x), tokens)
        shaped = theirs.decode(theirs.encode(x.view(4, 50, D_IN)), tokens.view(4, 50))
        copied = copy.deepcopy(theirs)
        assert torch.allclose(shaped.view(200, D_IN), flat, atol=1e-5)
        assert torch.equal(copied.decode(copied.encode(x), tokens), flat)


def test_a_table_is_never_left_out(tmp_path):
    folder = tu.save(our_sae("topk"), tmp_path / "s")
    theirs, x = sae_lens.SAE.load_from_disk(folder), activations()
    acts = theirs.encode(x)
    for call in (lambda: theirs(x), lambda: theirs.decode(acts)):
        with pytest.raises(ValueError, match="has a table and needs the tokens"):
            call()
    for tokens in (torch.zeros(199), torch.zeros(200, 1), torch.zeros(1, 200)):
        with pytest.raises(ValueError, match=r"tokens have shape .*expected \[200\]"):
            theirs.decode(acts, tokens.long())
    for token in (50, -1):
        with pytest.raises(ValueError, match=f"token {token} has no row in a table of 50 rows"):
            theirs.decode(acts, torch.full((200,), token))
    (folder / "token_lookup.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"token_lookup.safetensors is missing"):
        sae_lens.SAE.load_from_disk(folder)


def test_a_loader_that_brings_no_table_is_refused(tmp_path):
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    folder = tu.save(our_sae("topk"), tmp_path / "s")
    with pytest.raises(ValueError, match="the table's tensor W_lookup is missing"):
        sae_lens.SAE.load_from_disk(folder, converter=sae_lens_disk_loader)


@pytest.mark.parametrize("activation", KINDS)
def test_folders_with_a_plain_architecture_keep_their_table(tmp_path, activation):
    """Folders of before the names: a table is known by the metadata."""
    sae, tokens = our_sae(activation), torch.arange(200).remainder(50)
    folder = tu.save(sae, tmp_path / "s")
    before, name = tu.load(folder), tu.read_cfg(folder)["architecture"]
    edit_cfg(folder, architecture=name.removeprefix("tokenized_"))
    assert equal(tu.load(folder), before)
    theirs, x = sae_lens.SAE.load_from_disk(folder), activations()
    with torch.no_grad():
        x_hat = theirs.decode(theirs.encode(x), tokens)
        assert torch.allclose(x_hat, sae(x, tokens[:, None]).x_hat, atol=1e-4)


WITHOUT_OURS = """
import sys, torch
from sae_lens import SAE
sae = SAE.load_from_disk(sys.argv[1])
torch.save(sae.encode(torch.load(sys.argv[2])), sys.argv[3])
"""


def test_sae_lens_alone_refuses_and_has_a_way_to_the_features(tmp_path):
    """Without our import: a KeyError that names the architecture; after one edit, features."""
    sae, x = our_sae("topk"), activations()
    folder = tu.save(sae, tmp_path / "s")
    torch.save(x, tmp_path / "x.pt")
    files = [str(folder), str(tmp_path / "x.pt"), str(tmp_path / "acts.pt")]
    command = [sys.executable, "-c", WITHOUT_OURS, *files]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.stderr.strip().endswith("KeyError: 'tokenized_topk'")
    edit_cfg(folder, architecture="topk")
    subprocess.run(command, check=True)
    assert torch.allclose(torch.load(files[2]), sae.encode(x), atol=1e-5)


@pytest.mark.parametrize("subfolder", ["sub", "."])
def test_from_pretrained_fetches_the_table(tmp_path, monkeypatch, subfolder):
    """The hub's loader with a download that copies nothing: the files lie in a folder."""
    sae, tokens, x = our_sae("topk"), torch.arange(200).remainder(50), activations()
    folder = tu.save(sae, tmp_path / "repository" / subfolder)
    fetched = []

    def hf_hub_download(repo_id, filename, force_download=False):
        name = filename.removeprefix(f"{subfolder}/")
        fetched.append(name)
        if not (folder / name).exists():
            raise LocalEntryNotFoundError(name)
        return str(folder / name)

    for module in ("sae_lens.loading.pretrained_sae_loaders", "tsae.saelens_classes"):
        monkeypatch.setattr(f"{module}.hf_hub_download", hf_hub_download)
    theirs = sae_lens.SAE.from_pretrained("me/my-tsae", subfolder)
    assert "token_lookup.safetensors" in fetched
    with torch.no_grad():
        x_hat = theirs.decode(theirs.encode(x), tokens)
    assert torch.allclose(x_hat, sae(x, tokens[:, None]).x_hat, atol=1e-4)


def test_sae_lens_does_not_train_a_table(tmp_path):
    folder = tu.save(our_sae("topk"), tmp_path / "s")
    with pytest.raises(KeyError, match="tokenized_topk"):
        sae_lens.TrainingSAE.load_from_disk(folder)


# -- models that SAELens runs on a TSAE --


def hooked_model() -> sae_lens.HookedSAETransformer:
    """A random model with a centred stream, as `HookedSAETransformer.from_pretrained` gives it."""
    shape = {"n_layers": 2, "d_model": D_IN, "n_ctx": 32, "d_head": 8, "n_heads": 3, "d_mlp": 48}
    kind = {"d_vocab": 50, "act_fn": "gelu_new", "normalization_type": "LN", "seed": 0}
    model = sae_lens.HookedSAETransformer(HookedTransformerConfig(**shape, **kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.process_weights_(center_writing_weights=True)
    return model


def losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy [R, L - 1] of every prediction."""
    return functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")


def model_and_saes(folder: Path, activation: str, form: str = "with table") -> tuple:
    """(Model, our TSAE at its second layer, the same as SAELens loads it)."""
    sae = our_sae(activation, form)
    hook_name = "blocks.1.hook_resid_pre"
    sae.cfg = tu.TSAEConfig(**{**vars(sae.cfg), "hook_name": hook_name})
    return hooked_model(), sae, sae_lens.SAE.load_from_disk(tu.save(sae, folder))


def some_ids() -> torch.Tensor:
    """Two rows that start with token 0, which also stands inside the first."""
    ids = torch.randint(1, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[0, 5] = 0, 0
    return ids


def record(name: str, direction: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Record how far the losses of two runs differ, and check it."""
    difference = (ours - theirs).abs().max().item()
    row = {"direction": direction, "sae": name, "sae_lens": sae_lens.__version__}
    ROWS.append(row | {"largest_loss_difference": f"{difference:.2g}"})
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("activation", KINDS)
def test_a_run_there_equals_attach(tmp_path, activation, error_term, form):
    """At the positions that `attach` takes: all but the first and special tokens."""
    model, sae, theirs = model_and_saes(tmp_path / "s", activation, form)
    options = {"use_error_term": error_term, "exclude_special_tokens": [0]}
    with torch.no_grad():
        with attach(model, sae, error_term=error_term) as seen:
            expected = model(some_ids())
        with tokens_from(model, theirs):
            logits = model.run_with_saes(some_ids(), saes=[theirs], **options)
            cached, cache = model.run_with_cache_with_saes(some_ids(), saes=[theirs], **options)
            model.add_sae(theirs, **options)
            added = model(some_ids())
            model.reset_saes()
        clean = model(some_ids())
    name = f"{activation} {form}, error term" if error_term else f"{activation} {form}"
    here, there = losses(expected, some_ids()), losses(logits, some_ids())
    record(name, "HookedSAETransformer against attach", here, there)
    assert torch.equal(cached, logits) and torch.equal(added, logits)
    acts = cache["blocks.1.hook_resid_pre.hook_sae_acts_post"]
    keep = some_ids() != 0
    assert torch.allclose(acts[keep], seen.acts[keep], atol=1e-4)
    assert torch.allclose(losses(clean, some_ids()), there, atol=1e-3) == error_term


def test_every_position_is_patched_by_default(tmp_path):
    """SAELens's run takes the first position too, unlike `attach`."""
    model, sae, theirs = model_and_saes(tmp_path / "s", "topk")
    ids, name = some_ids(), "blocks.1.hook_resid_pre"

    def replace(stream, hook):
        return sae(stream.flatten(0, 1), ids.flatten()[:, None]).x_hat.view(stream.shape)

    with torch.no_grad(), tokens_from(model, theirs):
        everywhere = model.run_with_hooks(ids, fwd_hooks=[(name, replace)])
        with attach(model, sae):
            attached = model(ids)
        logits = model.run_with_saes(ids, saes=[theirs])
    here, there = losses(everywhere, ids), losses(logits, ids)
    record("topk", "HookedSAETransformer, every position", here, there)
    assert not torch.allclose(losses(attached, ids), there, atol=0.1)


def test_their_evaluation_counts_the_table_in(tmp_path):
    """Their losses and explained variance are those of our reconstruction."""
    from sae_lens import evals
    from sae_lens.training.activation_scaler import ActivationScaler

    model, sae, theirs = model_and_saes(tmp_path / "s", "topk")
    ids, name = some_ids(), "blocks.1.hook_resid_pre"
    store = SimpleNamespace(get_batch_tokens=lambda n: ids)
    run = {"n_batches": 1, "eval_batch_size_prompts": 2, "model_kwargs": {}}
    parts = ("l2_norms", "sparsity_metrics", "variance_metrics", "featurewise_density_statistics")
    wanted = {f"compute_{part}": True for part in parts}
    source = (theirs, model, store, ActivationScaler())
    with torch.no_grad(), tokens_from(model, theirs):
        x = model.run_with_cache(ids)[1][name]
        x_hat = sae(x.flatten(0, 1), ids.flatten()[:, None]).x_hat
        patched = model.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: x_hat.view_as(x))])
        found = evals.get_downstream_reconstruction_metrics(
            *source, compute_kl=False, compute_ce_loss=True, **run
        )
        quality, _ = evals.get_sparsity_and_variance_metrics(*source, **wanted, **run)
    assert found["ce_loss_with_sae"] == pytest.approx(losses(patched, ids).mean().item(), rel=1e-4)
    fvu = tu.reconstruction_error(x.flatten(0, 1), x_hat).fvu
    assert quality["explained_variance"] == pytest.approx(1 - fvu, rel=1e-3)


def test_text_that_is_generated_reaches_the_table(tmp_path):
    """With a cache each token is embedded alone, and its row is found: as in whole passes.

    TransformerLens 3's `generate` shows the SAE more positions than it embeds, which is refused.
    """
    model, _, theirs = model_and_saes(tmp_path / "s", "topk")
    with torch.no_grad(), tokens_from(model, theirs), model.saes(saes=[theirs]):
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
        ids = some_ids()
        step = model(ids, past_kv_cache=cache, attention_mask=torch.ones_like(ids))[:, -1:]
        for _ in range(4):
            ids = torch.cat([ids, step.argmax(-1)], dim=1)
            last = ids[:, -1:]
            step = model(last, past_kv_cache=cache, attention_mask=torch.ones_like(last))
            assert torch.allclose(step, model(ids)[:, -1:], atol=1e-4)
        options = {"max_new_tokens": 2, "do_sample": False, "verbose": False}
        with pytest.raises(ValueError, match=r"tokens have shape \[2, 1\], expected \[2, 11\]"):
            model.generate(some_ids(), use_past_kv_cache=False, stop_at_eos=False, **options)


def test_the_block_of_the_documents_runs(tmp_path, monkeypatch):
    """docs/interop.md on SAELens, with a model, an SAE, ids and activations at hand."""
    model, sae, _ = model_and_saes(tmp_path / "my_tsae", "topk")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/interop.md").read_text(), re.S)
    (block,) = [block for block in blocks if "from sae_lens" in block]
    names = {
        "model": model,
        "ids": some_ids(),
        "x": activations(),
        "tokens": torch.arange(200) % 50,
    }
    with torch.no_grad():
        exec(block, names)
        assert torch.allclose(names["x_hat"], sae(names["x"], names["tokens"]).x_hat, atol=1e-4)
    assert equal(tu.load("copy"), tu.load("my_tsae"))


def test_runs_without_tokens_are_refused(tmp_path):
    model, _, theirs = model_and_saes(tmp_path / "s", "topk")
    ids, message = some_ids(), "has a table and needs the tokens"
    with torch.no_grad():
        stream = model.run_with_cache(ids)[1]["blocks.0.hook_resid_pre"]
        with pytest.raises(ValueError, match=message):
            model.run_with_saes(ids, saes=[theirs])
        with tokens_from(model, theirs):
            model.run_with_saes(ids, saes=[theirs])
            with pytest.raises(ValueError, match=message):  # the tokens of the pass before are gone
                model.run_with_saes(stream, saes=[theirs], start_at_layer=0)
        with pytest.raises(ValueError, match=message):
            model.run_with_saes(ids, saes=[theirs])


def test_tokens_of_another_vocabulary_are_refused(tmp_path):
    model, _, theirs = model_and_saes(tmp_path / "s", "topk")
    theirs.W_lookup = torch.nn.Parameter(torch.zeros(49, D_IN))
    with (
        pytest.raises(ValueError, match="the table has 49 rows, the model 50 tokens"),
        tokens_from(model, theirs),
    ):
        pass


@pytest.mark.parametrize("activation", KINDS)
def test_a_bridge_there_gives_the_losses_of_ours(tmp_path, gpt2_folder, activation):
    """SAETransformerBridge with every position patched, against `LanguageModel.losses`."""
    sae = random_weights_sae(activation)
    theirs = sae_lens.SAE.load_from_disk(tu.save(sae, tmp_path / "s"))
    lm = tu.load_lm(gpt2_folder, device="cpu", bf16=False)
    bridge = sae_lens.SAETransformerBridge.boot_transformers(str(gpt2_folder), device="cpu")
    bridge.enable_compatibility_mode()
    ids = torch.randint(2, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))
    x = lm.activations(ids, [SMALL_HOOK])[SMALL_HOOK]
    with torch.no_grad(), tokens_from(bridge, theirs):
        x_hat = sae(x.flatten(0, 1), ids.flatten()[:, None]).x_hat.view(x.shape)
        logits = bridge.run_with_saes(ids, saes=[theirs])
        exact = bridge.run_with_saes(ids, saes=[theirs], use_error_term=True)
    for replacement, there in ((x_hat, logits), (x, exact)):
        expected = lm.losses(ids, SMALL_HOOK, replacement)
        name = activation if there is logits else f"{activation}, error term"
        record(name, "SAETransformerBridge against losses", expected, losses(there, ids))


# -- a folder of SAELens's here --


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
    torch.manual_seed(0)
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
    torch.manual_seed(0)
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
