"""One decoder block on its way through quantization: what enters it, in this model and in the original one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import fsum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.calibration.hidden_states import HiddenStates
from llmq.calibration.work_split import Share, shares_of
from llmq.core.distributed import ALONE, Ranks
from llmq.models.block_structure import Group, Submodule, linear_of

# Of a block's intermediate results, in bytes; what does not fit is computed again.
MOST_KEPT = 1 << 30


@dataclass(frozen=True)
class Compute:
    """Where and in what to compute."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of weights and hidden states."""
    precision: torch.dtype = torch.float32
    """Of the factors of matmuls inside the blocks, where that is lower."""

    @property
    def factors(self) -> torch.dtype:
        """The dtype in which matmuls want weights."""
        return self.precision if self.dtype == torch.float32 else self.dtype


@dataclass
class Block:
    """One decoder block with its weights loaded, and the hidden states that enter it."""

    name: str
    module: nn.Module
    hidden: HiddenStates
    """Those of this process, the held-out ones last."""
    held_out_from: int
    """Index of the first held-out micro-batch in `hidden`."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """What else the model passes to this very block: mask, rotary embedding, …"""
    compute: Compute
    original: HiddenStates | None = None
    """The same micro-batches as they enter this block in the original model, where that is asked for. Whoever runs the
    block on them leaves its outputs here."""
    ranks: Ranks = ALONE
    shares: list[Share] = field(default_factory=list)
    """The micro-batches of all processes, in the order in which they are summed."""
    sample: Tensor | None = None
    """A sequence that is the same in all processes."""
    _replaced: dict[str, Tensor] = field(default_factory=dict)
    """Parameters of the original model that the block does not compute with any more."""
    _expected: list[Group] = field(default_factory=list)
    _unfinished: set[str] = field(default_factory=set)
    _parts: dict[str, Submodule] = field(default_factory=dict)
    """By the name of the linear they end with."""
    _entering: dict[tuple[str, int, bool], Tensor] = field(default_factory=dict)
    """What enters such a linear, by its name, the micro-batch, and whether in the original model."""
    _leaving: dict[tuple[str, int, bool], Tensor] = field(default_factory=dict)
    """What leaves it, once its weight is final."""

    def __post_init__(self) -> None:
        if not self.shares:
            self.shares = shares_of(self.held_out_from, len(self.hidden) - self.held_out_from, self.ranks)
        if self.sample is None:
            self.sample = self.hidden[0][:1]

    @property
    def drift(self) -> float | None:
        """Share of what enters that differs from the original model on held-out tokens; None where it is not known."""
        if self.original is None:
            return None
        energies: list[tuple[float, float]] = []
        for i in range(self.held_out_from, len(self.hidden)):
            original = self.original[i].float()
            energies.append((float((self.hidden[i] - original).square().sum()), float(original.square().sum())))
        lost, whole = zip(*(pair for pairs in self.ranks.each(energies) for pair in pairs), strict=True)
        return fsum(lost) / fsum(whole)  # exact: whoever has which micro-batch

    @contextmanager
    def many_runs(self) -> Iterator[None]:
        """Inside, weights are as matmuls want them, instead of being rounded to that anew for every micro-batch."""
        linears = [module for module in self.module.modules() if isinstance(module, nn.Linear)]
        before = [linear.weight.data for linear in linears]
        for linear in linears:
            linear.weight.data = linear.weight.data.to(self.compute.factors)
        try:
            yield
        finally:
            for linear, W in zip(linears, before, strict=True):
                linear.weight.data = W

    @torch.no_grad()
    def run(self, hidden: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch tokens features"]:
        """The block's output for one micro-batch, on the block's device."""
        return self.run_with({}, hidden)

    def run_with(
        self, weights: dict[str, Tensor], hidden: Float[Tensor, "batch tokens features"]
    ) -> Float[Tensor, "batch tokens features"]:
        """The same with these tensors in place of the block's own, and with gradients where they are enabled."""
        args, kwargs = self.arguments
        device, factors = self.compute.device, self.compute.factors
        with torch.autocast(device.type, factors, enabled=factors != self.compute.dtype):
            output = torch.func.functional_call(self.module, weights, (hidden.to(device), *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def expect(self, groups: list[Group]) -> None:
        """Tell which linears are going to be replaced, one group after another or all at once.

        Between two groups the block runs again. Of a part that ends with a linear, what enters that linear is kept when
        all groups before it have been replaced: the part then runs once, instead of once for each group.
        """
        self._expected, self._unfinished = groups, {name for group in groups for name in group.linears}
        inside = {group.residual for group in groups if group.residual}  # what enters these is wanted: they must run
        for group in groups:
            if group.ends and not any(name.startswith(group.ends.name + ".") for name in inside):
                self._parts[group.linears[0]] = group.ends

    def run_batch(self, i: int, original: bool = False) -> Float[Tensor, "batch tokens features"]:
        """The block's output for micro-batch i of `hidden`, or of `original` with the weights of the original model."""
        hidden = self.hidden if self.original is None or not original else self.original
        with self._as_original() if original else nullcontext(), self._keeping(i, original):
            return self.run(hidden[i])

    @contextmanager
    def _keeping(self, i: int, original: bool) -> Iterator[None]:
        """Parts whose last input is known are not run up to it again; of the others it is kept once it is final."""
        handles: list[Any] = []
        resumed: list[Submodule] = []
        left = self._left
        for name, part in self._parts.items():
            key, linear = (name, i, original), linear_of(self.module, name)
            if key in self._entering or key in self._leaving:
                self.module.get_submodule(part.name).forward = partial(self._resume, key, part)
                resumed.append(part)
            elif self._runs_again(original) and (original or name in left[0].linears):

                def keep(_: nn.Module, args: tuple[Tensor, ...], key: Any = key) -> None:
                    kept = sum(tensor.nbytes for tensor in (*self._entering.values(), *self._leaving.values()))
                    if kept + args[0].nbytes <= MOST_KEPT:
                        self._entering[key] = args[0].cpu()

                handles.append(linear.register_forward_pre_hook(keep, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for part in resumed:
                del self.module.get_submodule(part.name).forward

    def _resume(self, key: tuple[str, int, bool], part: Submodule, *_: Any, **__: Any) -> Any:
        """What the part returns, from the kept input of its last linear; its output takes over once that is final."""
        name, _i, original = key
        if key in self._leaving:
            output = self._leaving[key].to(self.compute.device)
        else:
            output = linear_of(self.module, name)(self._entering[key].to(self.compute.device))
            if original or name not in self._unfinished:
                del self._entering[key]
                self._leaving[key] = output.cpu()
        if not self._runs_again(original):
            del self._leaving[key]
        return output if part.returns is None else (output, *[None] * (part.returns - 1))

    def _runs_again(self, original: bool) -> bool:
        """Whether after this run, before a group is replaced, there may be others; the last is in this model alone."""
        return len(self._left) > (1 if original else 0)

    @property
    def _left(self) -> list[Group]:
        """The groups that have not been replaced yet."""
        return [group for group in self._expected if not self._unfinished.isdisjoint(group.linears)]

    def forget(self) -> None:
        """Give up what was kept for further runs."""
        self._entering.clear()
        self._leaving.clear()

    def replace_weight(self, name: str, W: Float[Tensor, "out in"]) -> None:
        """The linear of that name computes with W from here on."""
        linear = linear_of(self.module, name)
        if self.original is not None:
            self._replaced.setdefault(f"{name}.weight", linear.weight.data.to(self.compute.factors))
        linear.weight.data = W.to(linear.weight.dtype)
        if name in self._unfinished:
            self._unfinished.remove(name)
        else:  # a second thought: what came of the first one is no longer true
            self.forget()

    def keep_original(self) -> None:
        """What is done to any parameter from here on is not done to the original model."""
        if self.original is not None:
            for name, parameter in self.module.named_parameters():
                dtype = self.compute.factors if parameter.ndim == 2 else parameter.dtype
                self._replaced[name] = parameter.data.to(dtype, copy=True)

    def forget_original(self) -> None:
        """The original model will not run through this block again."""
        self._replaced.clear()

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        """Inside, the block computes with the parameters that were replaced."""
        parameters = {name: self.module.get_parameter(name) for name in self._replaced}
        now = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self._replaced[name]
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = now[name]
