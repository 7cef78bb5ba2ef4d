"""A packed model runs from its files: weights are read when what holds them is called, and gone when it has run.

    embed_tokens ──► blocks.0: norms │ q_proj │ k_proj │ … ──► blocks.1 ──► … ──► norm ──► lm_head
        read, freed     read │ decoded, freed │ …       freed

So a model of any depth takes the memory of the float weights of one block and the codes of one linear.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from llmq.checkpoint.module_matching import fitting
from llmq.checkpoint.reader import Checkpoint
from llmq.models.model_source import tied_aliases

# Weights that are dequantized at a time: few enough that they are still in the caches when they are multiplied (7B
# block, 16 tokens, one core with AVX-512: 0.20 s; 0.31 s with a sixteenth, 1.35 s with whole linears; 2026-11-25).
_STRIP = 1 << 20


def read_when_called(model: Any, checkpoint: Checkpoint) -> None:
    """Let a skeleton, whose tensors are those of the files (see `check_fit`), run in float32 on the CPU.

    A block is read as a whole but for its packed linears: code in it uses weights of its parts without calling them
    (LFM2: `conv.weight`). Outside of blocks, modules are read one by one: such code would find nothing to compute with.
    The forwards raise CheckpointError for packed weights that cannot be decoded or do not fit the model.
    """
    for name in checkpoint.linears:
        model.get_submodule(name).forward = partial(_packed_forward, model, checkpoint, name)
    for unit, stored in _units(model, checkpoint).items():
        module = model.get_submodule(unit)
        if _is_linear(module):
            module.forward = partial(_linear_forward, checkpoint, stored)
        else:
            module.register_forward_pre_hook(partial(_fill, checkpoint, stored))
            module.register_forward_hook(partial(_empty, stored))


def _is_linear(module: nn.Module) -> bool:
    """Whether it computes what `nn.Linear` does."""
    return type(module) is nn.Linear


def _units(model: Any, checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Module -> its tensors that are not packed, by their name in it -> their name in the files."""
    aliases, repeats = tied_aliases(model), getattr(model, "all_tied_weights_keys", {})
    with_codes = {f"{name}.{leaf}" for name in checkpoint.linears for leaf in ("weight", "bias")}
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(model.state_dict().keys() - with_codes):
        source = repeats.get(name, name) if name in aliases else name
        if source in checkpoint.files.names():
            unit = _unit_of(model, name)
            found[unit][name[len(unit) + 1 if unit else 0 :]] = source
    return found


def _unit_of(model: Any, name: str) -> str:
    """The block that a tensor is in, which is the member of a list; outside of blocks the module it belongs to."""
    unit, module = "", model
    for step in name.split(".")[:-1]:
        is_list, module = isinstance(module, nn.ModuleList), module.get_submodule(step)
        unit = f"{unit}.{step}".lstrip(".")
        if is_list:
            break
    return unit


def _fill(checkpoint: Checkpoint, stored: dict[str, str], module: nn.Module, _: Any) -> None:
    tensors = {name: checkpoint.read(source) for name, source in stored.items()}
    if not isinstance(module, nn.Embedding):  # of whose rows a few are used
        tensors = {name: each.float() if each.is_floating_point() else each for name, each in tensors.items()}
    module.load_state_dict(tensors, strict=False, assign=True)


def _empty(stored: dict[str, str], module: nn.Module, _: Any, output: Any) -> Any:
    state = module.state_dict()
    module.load_state_dict({name: state[name].to("meta") for name in stored}, strict=False, assign=True)
    return output.float() if isinstance(module, nn.Embedding) else output


def _packed_forward(
    model: Any, checkpoint: Checkpoint, name: str, x: Float[Tensor, "*batch in"]
) -> Float[Tensor, "*batch out"]:
    weight, bias = fitting(model, checkpoint, name)

    def dequantized(rows: slice) -> Float[Tensor, "rows in"]:
        part = replace(weight, q=weight.q[rows], scale=weight.scale[rows], zero=weight.zero[rows])
        return part.dequantize(x.dtype)

    return _in_strips(x, len(weight.q), dequantized, bias)


def _linear_forward(
    checkpoint: Checkpoint, stored: dict[str, str], x: Float[Tensor, "*batch in"]
) -> Float[Tensor, "*batch out"]:
    W = checkpoint.read(stored["weight"])
    bias = checkpoint.read(stored["bias"]) if "bias" in stored else None
    return _in_strips(x, len(W), lambda rows: W[rows].to(x.dtype), bias)


def _in_strips(
    x: Float[Tensor, "*batch in"], rows: int, weight_of: Callable[[slice], Tensor], bias: Tensor | None
) -> Float[Tensor, "*batch out"]:
    """x Wᵀ + b, of whose rows a few are in memory as numbers at a time."""
    step = max(1, _STRIP // x.shape[-1])
    y = x.new_empty(*x.shape[:-1], rows)  # at once: small results between freed strips would keep these from being one
    for i in range(0, rows, step):
        y[..., i : i + step] = functional.linear(x, weight_of(slice(i, i + step)))
    return y if bias is None else y + bias.to(y.dtype)
