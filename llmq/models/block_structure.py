"""Finds the structure of a decoder block by running it; no list of known models is needed.

Linears that receive the very same tensor share one Hessian, one factorisation and one column loop. A llama block gives

    [[q_proj, k_proj, v_proj], [o_proj], [gate_proj, up_proj], [down_proj]]

The same run shows which norm produced that tensor: there AWQ folds its scales. Some pairs have an operation between
them that is not a module (v -> attention -> o, up -> multiply -> down). Only these pairs are declared below.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.models.experts import layout_of, layouts, linears_of
from llmq.models.experts_apart import is_added
from llmq.models.weight_reads import modules_of, weights_read

# (producer, consumer, a linear beside them): if that is there, output channel c of the producer's last rows only ever
# reaches input channel c of the consumer, and linearly. Without a gate, an activation lies between up and down.
_DECLARED_FOLDS = (
    ("v_proj", "o_proj", "v_proj"),
    ("up_proj", "down_proj", "gate_proj"),
    ("gate_up_proj", "down_proj", "gate_up_proj"),
)
# Linears that read the same input. Engines run them as one.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Group:
    """Linears of one block that share their input, by name inside the block, in call order."""

    linears: tuple[str, ...]
    producer: str | None = None
    """The module whose output can absorb a scale per channel: a norm, or a linear whose last rows feed this group."""
    norm_offset: float | None = None
    """A norm producer multiplies by weight + offset (Gemma stores weight - 1). None: the producer is a linear."""
    residual: str | None = None
    """The output is added to the input of the module with this name ("" is the block itself), which is the residual
    stream at that point. None if the output is not added to it directly."""
    ends: Submodule | None = None  # the child of the block that returns the output of this group's only linear
    is_read: bool = False  # the model also reads the weight of this group's only linear without a call
    calls: int = 1  # in one forward; a group whose linear runs never or often has no other linear
    expert: Expert | None = None  # of which the linears are a part; each sees the tokens that are routed to it
    is_added: bool = False  # it ends an expert, and the block returns the sum of what its experts return and the rest


@dataclass(frozen=True)
class Expert:
    """One of the experts of a block."""

    module: str  # the name of the experts inside the block
    number: int


@dataclass(frozen=True)
class Submodule:
    """A child of the block that ends with a linear: attention, the MLP."""

    name: str
    returns: int | None  # None: the output alone; a number: a tuple of this length, with the output, then only None


def find_groups(
    block: nn.Module, run: Callable[[Tensor], Tensor], hidden: Float[Tensor, "*batch tokens features"]
) -> list[Group]:
    """Run the block and group its linears by the identity of their input tensor.

    `run` calls the block with the arguments that the model gives it. The values of `hidden`, its input, do not matter.
    A linear that runs several times is in as many groups. One whose weight is also read without a call has its own.
    The groups of experts come last. They follow from the structure: a single run reaches only some experts. For each
    module of experts the block runs once more (see `is_added`).
    """
    seen = Observation(hidden.to(next(block.parameters()).device))
    with weights_read(block) as read, _hooked(block, seen.record):
        end = run(hidden)
    groups = []
    for tensor, readers in seen.linears_of_input.items():
        linears = [n for n in readers if n not in read and isinstance(block.get_submodule(n), nn.Linear)]
        if not linears:
            continue
        norm = seen.norm_of_output.get(tensor) if linears == readers else None
        offset = _norm_offset(block.get_submodule(norm), hidden) if norm is not None else None
        producer = norm if offset is not None else _declared_producer(block, linears)
        alone = len(linears) == 1
        residual = seen.residual_of(linears[0], end) if alone else None
        ends = seen.submodule_ended_by.get(linears[0]) if alone else None
        groups.append(Group(tuple(linears), producer, offset, residual, ends))
    added = {
        name
        for name, out in seen.output_of_experts.items()
        if is_added(block.get_submodule(name), run, hidden, out, end)
    }
    return groups + [Group((name,), is_read=True) for name in sorted(read)] + _groups_of_experts(block, added)


def _groups_of_experts(block: nn.Module, added: set[str]) -> list[Group]:
    """Return two groups for each expert: the linears before its activation, and the one after it."""
    groups = list[Group]()
    for module, layout in layouts(block).items():
        *before, after = linears_of(layout)
        for number in range(layout.experts):
            expert = Expert(module, number)
            groups.append(Group(tuple(f"{module}.{number}.{name}" for name in before), expert=expert))
            groups.append(Group((f"{module}.{number}.{after}",), expert=expert, is_added=module in added))
    return groups


class Observation:
    """What one run of a block shows. Tensors are told apart by `_identity`, modules by their name in the block."""

    def __init__(self, entering: Tensor) -> None:
        self.linears_of_input: dict[tuple[object, ...], list[str]] = {}  # in call order
        self.norm_of_output: dict[tuple[object, ...], str] = {}
        self.submodule_ended_by: dict[str, Submodule] = {}  # by the name of its last linear
        self.output_of_experts: dict[str, Tensor] = {}  # by the name of the module that holds them
        self._output_of: dict[str, Tensor] = {}  # of the linears
        self._linear_of_output: dict[tuple[object, ...], str] = {}
        self._residuals: dict[str, Tensor] = {"": entering}  # what enters the block and each norm
        self._alive: list[Tensor] = []  # keeps storages from being reused, which would make two tensors look like one

    def record(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note the call of one module."""
        # An expert without tokens has seen nothing, and all empty tensors look like one.
        takes = bool(args) and isinstance(args[0], Tensor) and args[0].numel() > 0
        if takes and isinstance(module, nn.Linear) and _is_plain(module, args[0], output):
            self.linears_of_input.setdefault(_identity(args[0]), []).append(name)
            self._alive.append(args[0])
            self._output_of[name] = output
            self._linear_of_output[_identity(output)] = name
        elif takes and isinstance(output, Tensor) and _is_norm(module) and len(args) == 1:  # two: it has a gate
            self.norm_of_output[_identity(output)] = name
            self._alive.append(output)
            self._residuals[name] = args[0]
        elif takes and layout_of(module) is not None:
            # Experts read this tensor, too: a scale that is folded into its norm would reach them.
            self.linears_of_input.setdefault(_identity(args[0]), []).append(name)
            self._alive.append(args[0])
            self.output_of_experts[name] = output.clone()  # the block may add to it in place
        elif "." not in name:
            self._record_child(name, output)

    def _record_child(self, name: str, output: Any) -> None:
        """Note a child of the block if it returns the output of one of its linears, alone or with None beside it."""
        first, *others = output if isinstance(output, tuple) else (output,)
        if isinstance(first, Tensor) and all(other is None for other in others):
            linear = self._linear_of_output.get(_identity(first), "")
            if linear.startswith(name + "."):
                self.submodule_ended_by[linear] = Submodule(name, len(output) if isinstance(output, tuple) else None)

    def residual_of(self, linear: str, end: Tensor) -> str | None:
        """Return the name of the residual to which the output of a linear is added.

        Their sum must be another residual or `end`, which leaves the block. None if there is no such sum.
        """
        output, sums = self._output_of[linear], [*self._residuals.values(), end]
        for name, residual in self._residuals.items():
            if residual.shape == output.shape:
                total = residual + output
                if any(total.shape == tensor.shape and torch.equal(total, tensor) for tensor in sums):
                    return name
        return None


@contextmanager
def _hooked(block: nn.Module, hook: Any) -> Generator[None]:
    """Call `hook(name, module, args, output)` after the forward of every submodule of `block`."""
    handles = [
        module.register_forward_hook(lambda m, args, output, name=name: hook(name, m, args, output))
        for name, module in modules_of(block)
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_of(block: nn.Module, name: str) -> nn.Linear:
    """Return the linear with this name inside the block."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), name
    return module


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor._version


def _is_plain(linear: nn.Linear, x: Tensor, output: Any) -> bool:
    """Return whether a linear returned x Wᵀ + b. A subclass may route tokens, or multiply by parts of its weight."""
    if type(linear).forward is nn.Linear.forward:
        return True
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    if not isinstance(output, Tensor) or output.shape != expected.shape:
        return False
    return bool((output - expected).norm() <= 0.01 * expected.norm())  # bfloat16 rounds; no other sum is as close


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1


def _norm_offset(norm: nn.Module, hidden: Tensor) -> float | None:
    """Return what the norm adds to its weight before it multiplies: 0 (llama) or 1 (gemma); None if it is neither."""
    weight: Any = norm.weight
    if weight.shape[0] != hidden.shape[-1]:
        return None
    kept, bias = weight.data, getattr(norm, "bias", None)
    try:
        for offset in (0.0, 1.0):
            weight.data = torch.full_like(kept, -offset)
            output = norm(hidden[:, :1].to(weight))
            if bool((output - (0 if bias is None else bias)).abs().max() == 0):
                return offset
        return None
    finally:
        weight.data = kept


def _declared_producer(block: nn.Module, linears: list[str]) -> str | None:
    parent, _, leaf = linears[0].rpartition(".")
    modules = dict(block.named_modules())
    for producer_leaf, consumer_leaf, beside in _DECLARED_FOLDS if len(linears) == 1 else ():
        name = f"{parent}.{producer_leaf}".lstrip(".")
        producer = modules.get(name) if f"{parent}.{beside}".lstrip(".") in modules else None
        rows = linear_of(block, linears[0]).in_features * (2 if producer_leaf == "gate_up_proj" else 1)
        # Under grouped-query attention several channels of o read one channel of v; no scale fits them all.
        if leaf == consumer_leaf and isinstance(producer, nn.Linear) and producer.out_features == rows:
            return name
    return None
