"""A causal language model and access to its residual stream.

Axes: R rows, L sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tsae.blocks import (
    Block,
    ReadOrReplace,
    StopForward,
    Sublayers,
    differ,
    find_blocks,
    find_sublayers,
    removed_afterwards,
    visit,
)
from tsae.kernels import fast_bf16

PLACES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
CONTEXT_KEYS = (  # names that configurations give to the longest context
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
PROBE_ROWS, PROBE_TOKENS = 2, 7  # of the passes that find out how a model works


class HookPoint(NamedTuple):
    """A place in block `layer`. What the last block returns is resid_pre of layer n_layers."""

    layer: int
    place: str  # one of PLACES but resid_post, which is resid_pre of the next layer


def parse_hook_point(hook: str | int, n_layers: int) -> HookPoint:
    """The place that "blocks.<layer>.hook_<place>" names; a number l is resid_pre of layer l.

    Raises ValueError for any other name and for a layer that the model does not have.
    """
    if isinstance(hook, int):
        if not 0 <= hook <= n_layers:
            raise ValueError(f"layer {hook} is out of range: the model has layers 0 to {n_layers}")
        return HookPoint(hook, "resid_pre")
    match = re.fullmatch(rf"blocks\.(\d+)\.hook_({'|'.join(PLACES)})", hook)
    if match is None:
        expected = ", ".join(f".hook_{place}" for place in PLACES)
        raise ValueError(f"unknown hook {hook!r}: expected blocks.<layer> with one of {expected}")
    layer, place = int(match[1]), match[2]
    if layer >= n_layers:
        raise ValueError(
            f"hook {hook!r} is out of range: the model has {n_layers} layers, 0 to {n_layers - 1}"
        )
    return HookPoint(layer + 1, "resid_pre") if place == "resid_post" else HookPoint(layer, place)


def parse_hook(hook_name: str, n_layers: int) -> int:
    """Layer l of "blocks.l.hook_resid_pre" (0 <= l < n_layers); ".hook_resid_post" is l + 1.

    Raises ValueError for any other name and for a layer that the model does not have.
    """
    layer, place = parse_hook_point(hook_name, n_layers)
    if place != "resid_pre":
        raise ValueError(
            f"{hook_name!r} is not between two blocks: expected .hook_resid_pre or .hook_resid_post"
        )
    return layer


def hub_name(source: str | Path) -> tuple[str, str | None]:
    """(name, revision) of "name@revision"; a local file or folder is taken as it is."""
    if Path(source).expanduser().exists():
        return str(source), None
    name, _, revision = str(source).partition("@")
    return name, revision or None


def real_tokens(
    ids_RL: Tensor, pad_id: int | None, bos_id: int, separator_id: int | None = None
) -> Tensor:
    """Which tokens are no padding [R, L]: leading and trailing runs of `pad_id` are padding.

    Where padding is also BOS, the last of a leading run is the BOS. Where it is also the separator,
    the first of a trailing run is one.
    """
    if pad_id is None:
        return torch.ones_like(ids_RL, dtype=torch.bool)
    is_pad = ids_RL == pad_id
    leading = is_pad.int().cumprod(-1).bool()
    trailing = is_pad.flip(-1).int().cumprod(-1).flip(-1).bool() & ~leading
    if pad_id == bos_id:
        leading &= F.pad(leading[:, 1:], (0, 1))
    if pad_id == separator_id:
        trailing &= F.pad(trailing[:, :-1], (1, 0))
    return ~(leading | trailing)


def fuse_gelu_(model: nn.Module) -> None:
    """Replace GPT-2's tanh GELU, eight operations in transformers, by torch's single one.

    transformers offers no structure that identifies it, so its class name has to.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))


class LanguageModel:
    """A causal language model of transformers, its tokenizer, and its residual stream.

    The residual stream is TransformerLens's: the raw one minus its mean over d_model where nothing
    in the model sees that mean (`centred`), as with LayerNorm, and the raw one elsewhere.

    Rows may be padded on either side with the tokenizer's padding token (`real_tokens`). Raises
    ValueError for a model whose blocks carry no residual stream, or that reads later tokens.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, bf16: bool | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        fuse_gelu_(model)
        self.device = next(model.parameters()).device
        # bf16 is for harvesting, never for cross-entropy
        self.bf16 = fast_bf16(self.device) if bf16 is None else bf16
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        self.n_vocab = min(len(e.weight) for e in embeddings if e is not None)
        self.config = model.config.get_text_config()
        self.bos_id, self.bos_note = self._bos()
        self.pad_id = tokenizer.pad_token_id
        eos = tokenizer.eos_token_id
        self.separator_id = self.bos_id if eos is None or eos >= self.n_vocab else eos
        self._blocks = self._find_blocks()
        self._sublayers: dict[int, Sublayers | None] = {}
        self.blocks = [block.module for block in self._blocks]
        self.n_layers = len(self.blocks)
        self.d_model = self._blocks[0].width  # of the stream; embeddings may be narrower
        self._require_causal()
        self.centred = self._ignores_the_mean()
        self._can_skip = self._passes_only_the_stream()

    @property
    def max_context(self) -> int | None:
        """Most tokens per row, by the model's configuration; None where it gives no limit."""
        limits = [getattr(self.config, key, None) for key in CONTEXT_KEYS]
        return next((n for n in limits if isinstance(n, int) and n > 0), None)

    def _bos(self) -> tuple[int, str]:
        """(Id of BOS or its substitute, a sentence about the substitute)."""
        tokens = {"BOS": self.tokenizer.bos_token_id, "EOS": self.tokenizer.eos_token_id}
        for name, value in tokens.items():
            if value is None:
                continue
            if value >= self.n_vocab:
                raise ValueError(
                    f"{self.name}: the tokenizer's {name} id {value} lies beyond the model's "
                    f"embedding of {self.n_vocab} rows: mend tokenizer_config.json or resize the "
                    "embedding"
                )
            if name == "BOS":
                return value, ""
            return value, f"{self.name} has no BOS token; EOS (id {value}) stands in for it"
        first = self.tokenizer.convert_ids_to_tokens(0)
        return 0, f"{self.name} has neither BOS nor EOS; token 0 ({first!r}) stands in for BOS"

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, configuration, BOS and separator, for records and caches."""
        shape = {
            key: value
            for key, value in self.model.config.to_dict().items()
            if isinstance(value, int | float | dict) and not key.startswith("_")
        }
        identity = [shape, self.bos_id, self.separator_id]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode())
        for p in self.model.parameters():
            digest.update(p.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    # -- what is found out by running the model --

    @cached_property
    def probe_ids(self) -> Tensor:
        """A few rows of ordinary tokens: none that the configuration gives a meaning."""
        config = {**self.model.config.to_dict(), **self.config.to_dict()}
        special = {self.bos_id, self.pad_id}
        for key, value in config.items():
            if "token" in key:
                values = value if isinstance(value, list) else [value]
                special |= {n for n in values if isinstance(n, int)}
        ordinary = [i for i in range(min(self.n_vocab, 1000)) if i not in special]
        ordinary = ordinary or list(range(self.n_vocab))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(len(ordinary), (PROBE_ROWS, PROBE_TOKENS), generator=generator)
        return torch.tensor(ordinary)[chosen]

    def _find_blocks(self) -> list[Block]:
        def run() -> None:
            try:
                self._logits(self.probe_ids)
            except Exception as error:
                raise ValueError(f"it does not run on token ids alone ({error})") from error

        try:
            return find_blocks(self.model, run, self.probe_ids.shape)
        except ValueError as error:
            raise ValueError(
                f"{self.name} ({type(self.model).__name__}) is not supported: {error}"
            ) from error

    def _require_causal(self) -> None:
        """Raise ValueError where a later token changes the prediction of an earlier one."""
        ids = self.probe_ids
        short = self.losses(ids[:, :-1])
        if not torch.isfinite(short).all():
            raise ValueError(f"{self.name} predicts NaN or infinity: check its weights")
        change = (self.losses(ids)[:, :-1] - short).abs().max().item()
        if not change < 1e-3 * max(1, short.max().item()):
            raise ValueError(
                f"{self.name} ({type(self.model).__name__}) is not supported: it is not causal, as "
                f"a later token changes earlier predictions by {change:.2g} nats"
            )

    @torch.no_grad()
    def _ignores_the_mean(self) -> bool:
        """Whether nothing in the model sees the stream's mean over d_model.

        A constant is added before the first block. It must arrive behind the last one and leave the
        logits as they are.
        """
        ends: list[Tensor] = []
        added = torch.rand(*self.probe_ids.shape, 1, generator=torch.Generator().manual_seed(1))

        def add(raw: Tensor) -> Tensor:
            return raw + raw.std(-1, keepdim=True) * (1 + added.to(raw))

        def moved_logits(change: ReadOrReplace) -> Tensor:
            with removed_afterwards(
                [visit(self._blocks[0].input, change), visit(self._blocks[-1].output, ends.append)]
            ):
                return self._logits(self.probe_ids)

        starts: list[Tensor] = []
        clean = moved_logits(starts.append)
        moved = moved_logits(add)
        shift = add(starts[0]) - starts[0]
        # Some streams grow large behind the first block, and their sums are rounded accordingly.
        rounding = 16 * torch.finfo(ends[0].dtype).eps * ends[0].abs().max().item()
        arrived = ends[1] - ends[0]
        is_carried = not differ(arrived, shift.expand_as(arrived), rounding)
        return is_carried and not differ(moved, clean)

    def _passes_only_the_stream(self) -> bool:
        """Whether the stream is all that the blocks hand on, so that some need not run."""
        if not all(block.hands_on_the_stream_alone for block in self._blocks):
            return False
        last, ids = self.n_layers - 1, self.probe_ids
        x = self.activations(ids, [last], bf16=False)[last]
        handles = self._visit(last, lambda raw: x)
        try:
            losses = self._losses(ids, handles, self.blocks[:last])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False  # a later block wants what an earlier one would have given
        return not differ(losses, self._losses(ids))

    # -- passes --

    def _logits(self, ids_RL: Tensor, **inputs: Tensor) -> Tensor:
        """One pass of the model [R, L, V]."""
        if "use_cache" in signature(self.model.forward).parameters:
            inputs["use_cache"] = False
        with torch.no_grad():
            return self.model(input_ids=ids_RL.to(self.device), **inputs).logits

    def require_rows(self, ids_RL: Tensor) -> None:
        """Raise ValueError for what is no rows, and for rows longer than the model's context."""
        if ids_RL.ndim != 2 or ids_RL.is_floating_point():
            raise ValueError(
                f"token rows are whole numbers of shape [R, L], not {ids_RL.dtype} of shape "
                f"{list(ids_RL.shape)}"
            )
        if self.max_context and ids_RL.shape[1] > self.max_context:
            raise ValueError(
                f"rows of {ids_RL.shape[1]} tokens are longer than {self.name}'s "
                f"{self.max_context} positions: shorten the context"
            )

    def _require_known(self, ids_RL: Tensor) -> None:
        """Raise ValueError for tokens that the model does not have."""
        if not ids_RL.numel():
            return
        lowest, highest = (int(n) for n in ids_RL.aminmax())
        if lowest < 0 or highest >= self.n_vocab:
            raise ValueError(
                f"token id {lowest if lowest < 0 else highest} is none of {self.name}'s, which are "
                f"0 to {self.n_vocab - 1}: is this the model's tokenizer?"
            )

    def _align(self, ids_RL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(Rows with padding on the right, index [R, L] that moves it there, and one back).

        A causal model gives a row that starts with text what it gives the text alone. Masks and
        positions, which architectures treat differently, are not needed.
        """
        self.require_rows(ids_RL)
        ids_RL = ids_RL.to(self.device).long()
        real = real_tokens(ids_RL, self.pad_id, self.bos_id, self.separator_id)
        ids_RL = ids_RL.masked_fill(~real, self.bos_id)  # padding may have no embedding
        self._require_known(ids_RL)
        places = torch.arange(ids_RL.shape[1], device=self.device)
        first = real.int().argmax(-1, keepdim=True)
        there, back = (places + first) % len(places), (places - first) % len(places)
        return ids_RL.gather(1, there), there, back

    def require_hook(self, hook: str | int) -> None:
        """Raise ValueError for a hook point that the model does not have."""
        for handle in self._visit(hook, lambda raw: None):
            handle.remove()

    def _sublayers_of(self, layer: int) -> Sublayers:
        """Attention and MLP of a block. Raises ValueError where it does not add the two."""
        if layer not in self._sublayers:
            block = self._blocks[layer]
            self._sublayers[layer] = find_sublayers(block, lambda: self._logits(self.probe_ids))
        found = self._sublayers[layer]
        if found is None:
            raise ValueError(
                f"block {layer} of {self.name} does not add the results of an attention and of an "
                "MLP to its input: use hook_resid_pre or hook_resid_post"
            )
        return found

    def _visit(self, hook: str | int, read_or_replace: ReadOrReplace) -> list[RemovableHandle]:
        """Show the raw tensor at a hook point to a function in every pass; see `visit`."""
        layer, place = parse_hook_point(hook, self.n_layers)
        if place == "resid_pre":
            is_last = layer == self.n_layers
            site = self._blocks[-1].output if is_last else self._blocks[layer].input
            return [visit(site, read_or_replace)]
        sublayers = self._sublayers_of(layer)
        if place == "resid_mid" and sublayers.is_parallel:
            raise ValueError(
                f"{hook!r} does not exist: blocks of {self.name} run attention and MLP in parallel"
            )
        inputs: list[Tensor] = []

        def at_sublayer(raw: Tensor) -> Tensor | None:
            x = inputs.pop()
            out = raw.view(x.shape)
            new = read_or_replace(x + out if place == "resid_mid" else out)
            if new is None:
                return None
            return (new - x if place == "resid_mid" else new).reshape(raw.shape)

        site = sublayers.mlp if place == "mlp_out" else sublayers.attn
        return [visit(self._blocks[layer].input, inputs.append), visit(site, at_sublayer)]

    def _to_stream(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        return raw - raw.mean(-1, keepdim=True) if self.centred else raw

    @torch.no_grad()
    def activations(
        self,
        ids_RL: Tensor,
        hooks: Iterable[int | str],
        bf16: bool | None = None,
        positions_RL: Tensor | None = None,
    ) -> dict[int | str, Tensor]:
        """Activations [R, L, D] in fp32 at each of `hooks`: layers, or names as in TransformerLens.

        A layer l stands for the stream that enters block l. The pass ends at the last hook.
        `positions_RL` gives tokens other positions than 0, 1, 2, ... Raises ValueError for a hook
        that the model does not have and for rows that it cannot read.
        """
        found: dict[int | str, Tensor] = {}
        hooks = list(dict.fromkeys(hooks))

        def reader(hook: int | str) -> ReadOrReplace:
            def read(raw: Tensor) -> None:
                found[hook] = self._to_stream(raw)
                if len(found) == len(hooks):
                    raise StopForward

            return read

        ids_RL, there, back = self._align(ids_RL)
        inputs = {}
        if positions_RL is not None:
            positions_RL = positions_RL.to(self.device).expand_as(ids_RL)
            inputs["position_ids"] = positions_RL.gather(1, there)
            # Without a mask a jump of positions would be taken for the start of another text.
            inputs["attention_mask"] = torch.ones_like(inputs["position_ids"])
        use_bf16 = self.bf16 if bf16 is None else bf16
        handles = [handle for hook in hooks for handle in self._visit(hook, reader(hook))]
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16)
        with removed_afterwards(handles), autocast, suppress(StopForward):
            self._logits(ids_RL, **inputs)
        return {hook: x.take_along_dim(back[..., None], 1) for hook, x in found.items()}

    @torch.no_grad()
    def losses(self, ids_RL: Tensor, hook: int | str = 0, x_RLD: Tensor | None = None) -> Tensor:
        """Cross-entropy [R, L-1] in nats (fp32) of every next token.

        `x_RLD` replaces the activations at `hook`; blocks before that layer do not run where the
        stream is all they hand on. The mean that centring removed is not put back: nothing in the
        model sees it. Raises ValueError as `activations` does.
        """
        ids_RL, handles, skipped, back = self._replacing(ids_RL, hook, x_RLD)
        return self._losses(ids_RL, handles, skipped).gather(1, back)[:, :-1]

    @torch.no_grad()
    def losses_and_divergence(
        self, ids_RL: Tensor, hook: int | str, x_RLD: Tensor, y_RLD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Cross-entropy, KL divergence) [R, L-1] in nats (fp32) with `y_RLD` at `hook`.

        The divergence is KL(p || q) of the next token, p under `x_RLD` and q under `y_RLD`.
        Raises ValueError as `activations` does.
        """
        aligned_RL, handles, skipped, back = self._replacing(ids_RL, hook, x_RLD)
        p = self._logits_with(aligned_RL, handles, skipped).log_softmax(-1)
        aligned_RL, handles, skipped, back = self._replacing(ids_RL, hook, y_RLD)
        logits = self._logits_with(aligned_RL, handles, skipped)
        losses = next_token_losses(logits, aligned_RL)
        divergence = torch.stack(  # row by row: a vocabulary is large
            [
                F.kl_div(q_LV.log_softmax(-1), p_LV, reduction="none", log_target=True).sum(-1)
                for q_LV, p_LV in zip(logits, p, strict=True)
            ]
        )
        return losses.gather(1, back)[:, :-1], divergence.gather(1, back)[:, :-1]

    def _replacing(
        self, ids_RL: Tensor, hook: int | str, x_RLD: Tensor | None
    ) -> tuple[Tensor, list[RemovableHandle], list[nn.Module], Tensor]:
        """(Rows without padding in front, hooks, blocks that need not run, the way back)."""
        ids_RL, there, back = self._align(ids_RL)
        if x_RLD is None:
            return ids_RL, [], [], back
        x_RLD = x_RLD.to(self.device).expand(*ids_RL.shape, self.d_model)
        x_RLD = x_RLD.take_along_dim(there[..., None], 1)
        layer, place = parse_hook_point(hook, self.n_layers)
        skips = place == "resid_pre" and self._can_skip
        handles = self._visit(hook, lambda raw: x_RLD)
        return ids_RL, handles, list(self.blocks[:layer]) if skips else [], back

    def _losses(
        self,
        ids_RL: Tensor,
        handles: Iterable[RemovableHandle] = (),
        skipped: Iterable[nn.Module] = (),
    ) -> Tensor:
        """Cross-entropy [R, L] of every next token; the last column has no target."""
        return next_token_losses(self._logits_with(ids_RL, handles, skipped), ids_RL)

    def _logits_with(
        self,
        ids_RL: Tensor,
        handles: Iterable[RemovableHandle] = (),
        skipped: Iterable[nn.Module] = (),
    ) -> Tensor:
        """Logits [R, L, V] in fp32. Skipped blocks hand on their input; the hooks are removed."""
        blocks = {block.module: block for block in self._blocks}

        def pass_through(block: Block) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                slot = block.input.slot
                x = (kwargs if isinstance(slot, str) else args)[slot]
                return block.result(x)

            return forward

        skipped = list(skipped)
        for module in skipped:  # an attribute of the instance hides the method of its class
            module.forward = pass_through(blocks[module])
        try:
            with removed_afterwards(handles):
                return self._logits(ids_RL).float()
        finally:
            for module in skipped:
                del module.forward


def next_token_losses(logits_RLV: Tensor, ids_RL: Tensor) -> Tensor:
    """Cross-entropy [R, L] in nats of every next token; the last column has no target."""
    # Slicing the logits instead of padding the targets would copy them.
    targets = F.pad(ids_RL[:, 1:], (0, 1)).to(logits_RLV.device)
    losses = F.cross_entropy(logits_RLV.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(ids_RL.shape)


@torch.no_grad()
def check_replacement(
    lm: LanguageModel,
    hooks: Iterable[int | str] | None = None,
    ids_RL: Tensor | None = None,
    tolerance: float = 1e-5,
) -> float:
    """The largest change of a next-token loss, in nats, when activations are put back as they are.

    `hooks` are all layers unless given, rows a few of the model's tokens. Raises ValueError naming
    the hook where losses change by more than `tolerance` times the largest loss: measurements
    there would be wrong.
    """
    hooks = range(lm.n_layers + 1) if hooks is None else hooks
    ids_RL = lm.probe_ids if ids_RL is None else ids_RL
    clean, largest = lm.losses(ids_RL), 0.0
    for hook in hooks:
        x = lm.activations(ids_RL, [hook], bf16=False)[hook]
        change = (lm.losses(ids_RL, hook, x) - clean).abs().max().item()
        if not change <= tolerance * max(1.0, clean.max().item()):
            raise ValueError(
                f"putting the activations of {lm.name} at {hook!r} back changes next-token losses "
                f"by up to {change:.2g} nats: nothing can be measured there"
            )
        largest = max(largest, change)
    return largest


def best_device() -> str:
    """cuda, mps or cpu, in this order."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def read_gguf(path: Path) -> tuple[nn.Module, Any]:
    """(Model with weights in fp32, tokenizer) of a GGUF file, which may be quantised.

    Raises FileNotFoundError where there is none, ValueError where transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}: expected a GGUF file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32
        )
    except Exception as error:  # readers of GGUF raise errors of many kinds for a damaged file
        raise ValueError(
            f"{path} is damaged or of an architecture whose GGUF files transformers does not read "
            f"({type(error).__name__}: {error}): fetch it again, or give a Hugging Face folder"
        ) from error
    config = quantised.config
    vars(config).pop("quantization_config", None)  # the weights are numbers as any other
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    return model, tokenizer


def read_hugging_face(source: str | Path) -> tuple[nn.Module, Any]:
    """(Model with weights in fp32, tokenizer) of a local folder or of the hub.

    Raises FileNotFoundError where there is none, ValueError for damaged weights.
    """
    from huggingface_hub.errors import HTTPError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, revision = hub_name(source)
    path = Path(name).expanduser()
    looks_like_a_path = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    if (path.exists() or looks_like_a_path) and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: expected a Hugging Face folder with config.json, or a .gguf file"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision)
        model = AutoModelForCausalLM.from_pretrained(
            str(path), revision=revision, dtype=torch.float32
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {path} are damaged ({error}): fetch them again"
        ) from error
    except (OSError, HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"could not load the model {str(source)!r}: it is neither a local folder with "
            "config, tokenizer and weights nor a hub model that can be reached: check name and "
            f"network, or give a local copy ({reason})"
        ) from error
    return model, tokenizer


def load_lm(
    name_or_path: str | Path, device: str | None = None, bf16: bool | None = None
) -> LanguageModel:
    """Load a model, weights in fp32, from the hub, a local folder or a GGUF file.

    On the hub, "name" or "name@revision". Raises FileNotFoundError where there is none, ValueError
    for damaged weights and for a BOS id outside the embedding.
    """
    path = Path(name_or_path).expanduser()
    is_gguf = path.suffix.lower() == ".gguf"
    model, tokenizer = read_gguf(path) if is_gguf else read_hugging_face(name_or_path)
    return LanguageModel(model.to(device or best_device()), tokenizer, str(name_or_path), bf16)
