"""A causal language model and access to its residual stream.

Axes: R rows, L sequence, D d_model, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from tsae.kernels import fast_bf16

ReadOrReplace = Callable[[Tensor], Tensor | None]  # gets the stream; returns a new one, or None


class StopForward(Exception):
    """Ends a forward pass once the last wanted layer is read."""


def parse_hook(hook_name: str, n_layers: int) -> int:
    """Layer l of "blocks.l.hook_resid_pre" (0 <= l < n_layers).

    "hook_resid_post" of block l is layer l + 1. Raises ValueError for any other name and for a
    layer that the model does not have.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name)
    if match is None:
        raise ValueError(
            f"unknown hook {hook_name!r}: expected blocks.<layer>.hook_resid_pre or "
            ".hook_resid_post"
        )
    layer, place = int(match[1]), match[2]
    if layer >= n_layers:
        raise ValueError(
            f"hook {hook_name!r} is out of range: the model has {n_layers} layers, "
            f"0 to {n_layers - 1}"
        )
    return layer + (place == "post")


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


def find_blocks(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The model's transformer blocks: of the lists of that length, the one with most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def subtracts_mean(blocks: nn.ModuleList) -> bool:
    """Whether the blocks normalise with LayerNorm, which removes the mean over d_model.

    Models define LayerNorms of their own, so that only the class name tells.
    """
    return any(type(m).__name__.endswith("LayerNorm") for m in blocks.modules())


class LanguageModel:
    """A causal language model of transformers, its tokenizer, and its residual stream.

    The residual stream is TransformerLens's: the raw one for RMSNorm models, and for LayerNorm
    models the raw one minus its mean over d_model (`centred`), which no LayerNorm sees.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, bf16: bool | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.name = tokenizer, name
        fuse_gelu_(model)
        self.device = next(model.parameters()).device
        # bf16 is for harvesting, never for cross-entropy
        self.bf16 = fast_bf16(self.device) if bf16 is None else bf16
        self.n_vocab, self.d_model = model.get_input_embeddings().weight.shape
        self.n_layers = model.config.num_hidden_layers
        self.blocks = find_blocks(model, self.n_layers)
        self.centred = subtracts_mean(self.blocks)
        self.bos_id, self.bos_note = self._bos()
        self.pad_id = tokenizer.pad_token_id
        eos = tokenizer.eos_token_id
        self.separator_id = self.bos_id if eos is None or eos >= self.n_vocab else eos

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

    def _to_stream(self, raw: Tensor) -> Tensor:
        raw = raw.float()
        return raw - raw.mean(-1, keepdim=True) if self.centred else raw

    def _hook(self, layer: int, read_or_replace: ReadOrReplace) -> RemovableHandle:
        """Register on the input of block `layer`; for layer n_layers on the last block's output."""

        def before(module, args, kwargs):
            if args:
                new = read_or_replace(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = read_or_replace(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        def after(module, args, output):
            is_tuple = isinstance(output, tuple)
            new = read_or_replace(output[0] if is_tuple else output)
            return (new, *output[1:]) if is_tuple and new is not None else new

        if layer == self.n_layers:
            return self.blocks[-1].register_forward_hook(after)
        return self.blocks[layer].register_forward_pre_hook(before, with_kwargs=True)

    @torch.no_grad()
    def activations(
        self,
        ids_RL: Tensor,
        layers: Iterable[int],
        bf16: bool | None = None,
        positions_RL: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Residual stream [R, L, D] in fp32 entering each of `layers`.

        The pass ends at the last of them. `positions_RL` gives tokens other positions than
        0, 1, 2, ...
        """
        layers = sorted(set(layers))
        streams: dict[int, Tensor] = {}

        def reader(layer: int) -> ReadOrReplace:
            def read(raw: Tensor) -> None:
                streams[layer] = self._to_stream(raw)
                if layer == layers[-1]:
                    raise StopForward

            return read

        inputs = {"input_ids": ids_RL.to(self.device)}
        if positions_RL is not None:
            inputs["position_ids"] = positions_RL.to(self.device)
            # Without a mask a jump of positions would be taken for the start of another text.
            inputs["attention_mask"] = torch.ones_like(inputs["position_ids"])
        use_bf16 = self.bf16 if bf16 is None else bf16
        handles = [self._hook(layer, reader(layer)) for layer in layers]
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16):
                self.model.base_model(use_cache=False, **inputs)
        except StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return streams

    @torch.no_grad()
    def losses(self, ids_RL: Tensor, layer: int = 0, x_RLD: Tensor | None = None) -> Tensor:
        """Cross-entropy [R, L-1] in nats (fp32) of every next token.

        `x_RLD` replaces the residual stream entering `layer`, and the blocks before do not run.
        The mean that centring removed is not put back: every LayerNorm subtracts it.
        """
        handles, skipped = [], []
        if x_RLD is not None:
            handles = [self._hook(layer, lambda raw: x_RLD)]
            skipped = self.blocks[:layer]

        def pass_through(*args, **kwargs):
            return args[0] if args else kwargs["hidden_states"]

        for block in skipped:  # an attribute of the instance hides the method of its class
            block.forward = pass_through
        ids_RL = ids_RL.to(self.device)
        try:
            logits = self.model(input_ids=ids_RL, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()
            for block in skipped:
                del block.forward
        # The last column has no target and is cut off; slicing the logits would copy them.
        targets = F.pad(ids_RL[:, 1:], (0, 1))
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(ids_RL.shape)[:, :-1]


def best_device() -> str:
    """cuda, mps or cpu, in this order."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_lm(
    name_or_path: str | Path, device: str | None = None, bf16: bool | None = None
) -> LanguageModel:
    """Load a model, weights in fp32, from the hub ("name" or "name@revision") or a local folder.

    Raises FileNotFoundError where neither exists, ValueError for damaged weights and for a BOS id
    outside the embedding.
    """
    from huggingface_hub.errors import HTTPError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, revision = hub_name(name_or_path)
    path = Path(name).expanduser()
    looks_like_a_path = path.is_absolute() or name.startswith(".") or len(path.parts) > 2
    if (path.exists() or looks_like_a_path) and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"no model at {path}: expected a Hugging Face folder with config.json"
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
            f"could not load the model {str(name_or_path)!r}: it is neither a local folder with "
            "config, tokenizer and weights nor a hub model that can be reached: check name and "
            f"network, or give a local copy ({reason})"
        ) from error
    return LanguageModel(model.to(device or best_device()), tokenizer, str(name_or_path), bf16)
