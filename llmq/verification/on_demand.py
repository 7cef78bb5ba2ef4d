"""Run a packed model from its files: a module's weights are read when it is called and freed when it has run.

    embed_tokens ──► blocks.0: norms │ q_proj │ k_proj │ … ──► blocks.1 ──► … ──► norm ──► lm_head
        read, freed     read │ decoded, freed │ …       freed

So memory holds the float weights of one block and the codes of one linear, however deep the model is.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from llmq.checkpoint.module_matching import read_linear
from llmq.checkpoint.reader import Checkpoint
from llmq.models.stored_names import tied_names

# Number of weights that are dequantized together: few enough to be still in the caches when they are multiplied (7B
# block, 16 tokens, one core with AVX-512: 0.20 s; 0.31 s with a sixteenth, 1.35 s with whole linears; 2026-11-25).
_STRIP = 1 << 20


def read_when_called(model: Any, checkpoint: Checkpoint) -> None:
    """Prepare a model without weights to run from the files in float32 on the CPU. `check_fit` must have passed.

    A block is read as a whole, but for its packed linears: its code may use the weights of a submodule without calling
    it (LFM2: `conv.weight`). Outside of blocks, modules are read one by one; such code finds no weights there.
    The forwards raise CheckpointError if a packed weight cannot be decoded or does not fit the model.
    """
    for name in checkpoint.linears:
        model.get_submodule(name).forward = partial(_packed_forward, model, checkpoint, name)
    for unit, stored in _units(model, checkpoint).items():
        module = model.get_submodule(unit)
        if type(module) is nn.Linear:  # a subclass may compute something else
            module.forward = partial(_linear_forward, checkpoint, stored)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            _caller_of(model, unit).register_forward_pre_hook(partial(_fill, checkpoint, stored, module))
            module.register_forward_hook(partial(_empty, stored))


def _caller_of(model: Any, unit: str) -> nn.Module:
    """Return the module whose call begins the use of a unit.

    For embeddings it is the module around them: Llama-4 asks their weight for its device before it calls them.
    """
    module, around = model.get_submodule(unit), model.get_submodule(unit.rpartition(".")[0])
    is_called = not isinstance(around, nn.ModuleList | nn.ModuleDict)
    return around if isinstance(module, nn.Embedding) and is_called else module


def _units(model: Any, checkpoint: Checkpoint) -> dict[str, dict[str, str]]:
    """Return for each unit that is read at once: name of a tensor in the unit -> its name in the files."""
    repeats = tied_names(model)
    with_codes = {f"{name}.{leaf}" for name in checkpoint.linears for leaf in ("weight", "bias")}
    units: dict[str, dict[str, str]] = defaultdict(dict)
    for name in sorted(model.state_dict().keys() - with_codes):
        source = repeats.get(name, name)
        if source in checkpoint.files.names():
            unit = _unit_of(model, name)
            units[unit][name[len(unit) + 1 if unit else 0 :]] = source
    return units


def _unit_of(model: Any, name: str) -> str:
    """Return the name of the block (a member of a list) that a tensor is in; outside of blocks, of its module."""
    unit, module = "", model
    for child in name.split(".")[:-1]:
        is_list, module = isinstance(module, nn.ModuleList), module.get_submodule(child)
        unit = f"{unit}.{child}".lstrip(".")
        if is_list:
            break
    return unit


def _fill(checkpoint: Checkpoint, stored: dict[str, str], module: nn.Module, _caller: nn.Module, _args: Any) -> None:
    tensors = {name: checkpoint.read(source) for name, source in stored.items()}
    if not isinstance(module, nn.Embedding):  # few of its rows are used: `_empty` converts those
        tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    module.load_state_dict(tensors, strict=False, assign=True)


def _empty(stored: dict[str, str], module: nn.Module, _: Any, output: Any) -> Any:
    state = module.state_dict()
    module.load_state_dict({name: state[name].to("meta") for name in stored}, strict=False, assign=True)
    return output.float() if isinstance(module, nn.Embedding) else output


def _packed_forward(
    model: Any, checkpoint: Checkpoint, name: str, x: Float[Tensor, "*batch in"]
) -> Float[Tensor, "*batch out"]:
    """Compute a packed linear; its codes are in memory only meanwhile."""
    weight, bias = read_linear(model, checkpoint, name)

    def dequantized(rows: slice) -> Float[Tensor, "rows in"]:
        strip = replace(weight, q=weight.q[rows], scale=weight.scale[rows], zero=weight.zero[rows])
        return strip.dequantize(x.dtype)

    return _in_strips(x, len(weight.q), dequantized, bias)


def _linear_forward(
    checkpoint: Checkpoint, stored: dict[str, str], x: Float[Tensor, "*batch in"]
) -> Float[Tensor, "*batch out"]:
    """Compute a linear that is not packed; its weight is in memory only meanwhile."""
    W = checkpoint.read(stored["weight"])
    bias = checkpoint.read(stored["bias"]) if "bias" in stored else None
    return _in_strips(x, len(W), lambda rows: W[rows].to(x.dtype), bias)


def _in_strips(
    x: Float[Tensor, "*batch in"], rows: int, weight_of: Callable[[slice], Tensor], bias: Tensor | None
) -> Float[Tensor, "*batch out"]:
    """Return x Wᵀ + b. Only a strip of the rows of W is in memory as float numbers at a time."""
    height = max(1, _STRIP // x.shape[-1])
    y = x.new_empty(*x.shape[:-1], rows)  # allocated once: small results between freed strips would fragment memory
    for i in range(0, rows, height):
        y[..., i : i + height] = functional.linear(x, weight_of(slice(i, i + height)))
    return y if bias is None else y + bias.to(y.dtype)
