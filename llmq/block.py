"""One decoder block on its way through quantization: what enters it, in this model and in the original one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from llmq.arch import Group, linear_of


@dataclass(frozen=True)
class Compute:
    """Where and in what to compute."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    """Of weights and hidden states."""
    precision: torch.dtype = torch.float32
    """Of the factors of matmuls inside the blocks."""


@dataclass
class Block:
    """One decoder block with its weights loaded, and the hidden states that enter it."""

    name: str
    module: nn.Module
    hidden: list[Tensor]
    """Micro-batches [samples, tokens, features] on the CPU, the held-out ones last."""
    held_out_from: int
    """Index of the first held-out micro-batch in `hidden`."""
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    """What else the model passes to this very block: mask, rotary embedding, …"""
    compute: Compute
    original: list[Tensor] | None = None
    """The same micro-batches as they enter this block in the original model, where that is asked for. Whoever runs the
    block on them leaves its outputs here."""
    _replaced: dict[str, Tensor] = field(default_factory=dict)
    _unfinished: set[str] = field(default_factory=set)
    _parts: dict[str, set[str]] = field(default_factory=dict)
    _outputs: dict[tuple[str, int, bool], Any] = field(default_factory=dict)

    @property
    def drift(self) -> float | None:
        """Share of what enters that differs from the original model on held-out tokens; None where it is not known."""
        if self.original is None:
            return None
        lost = whole = 0.0
        for hidden, original in zip(
            self.hidden[self.held_out_from :], self.original[self.held_out_from :], strict=True
        ):
            lost += float((hidden - original).float().square().sum())
            whole += float(original.float().square().sum())
        return lost / whole

    @torch.no_grad()
    def run(self, hidden: Float[Tensor, "batch tokens features"]) -> Float[Tensor, "batch tokens features"]:
        """The block's output for one micro-batch, on the block's device."""
        args, kwargs = self.arguments
        device, precision = self.compute.device, self.compute.precision
        with torch.autocast(device.type, precision, enabled=precision != hidden.dtype):
            output = self.module(hidden.to(device), *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def expect(self, groups: list[Group]) -> None:
        """Tell which linears are going to be replaced, one group after another.

        Between two groups the block runs again. A part of it whose linears are all replaced gives what it gave before:
        its outputs are then remembered instead of computed, half of the arithmetic.
        """
        self._unfinished = {name for group in groups for name in group.linears}
        watched = {group.residual for group in groups if group.residual}  # their inputs are wanted: they must run
        for part, _ in self.module.named_children():
            linears = {name for name in self._unfinished if name.startswith(part + ".")}
            if linears and not any(name.startswith(part + ".") for name in watched):
                self._parts[part] = linears

    def run_batch(self, i: int, original: bool = False) -> Float[Tensor, "batch tokens features"]:
        """The block's output for micro-batch i of `hidden`, or of `original` with the weights of the original model."""
        hidden = self.hidden if self.original is None or not original else self.original
        with self._as_original() if original else nullcontext(), self._remembering(i, original):
            return self.run(hidden[i])

    @contextmanager
    def _remembering(self, i: int, original: bool) -> Iterator[None]:
        """Parts that are finished run at most once for each micro-batch."""
        finished = [part for part, linears in self._parts.items() if not linears & self._unfinished]
        for part in finished:
            module, key = self.module.get_submodule(part), (part, i, original)

            def remember(*args: Any, module: nn.Module = module, key: Any = key, **kwargs: Any) -> Any:
                if key in self._outputs:
                    return tree_map_only(Tensor, lambda kept: kept.to(self.compute.device), self._outputs[key])
                output = type(module).forward(module, *args, **kwargs)
                if self._unfinished:  # there will be another run
                    self._outputs[key] = tree_map_only(Tensor, Tensor.cpu, output)
                return output

            module.forward = remember
        try:
            yield
        finally:
            for part in finished:
                del self.module.get_submodule(part).forward

    def replace_weight(self, name: str, W: Float[Tensor, "out in"]) -> None:
        """The linear of that name computes with W from here on."""
        linear = linear_of(self.module, name)
        if self.original is not None:
            self._replaced.setdefault(name, linear.weight.data)
        linear.weight.data = W.to(linear.weight.dtype)
        self._unfinished.discard(name)

    @contextmanager
    def _as_original(self) -> Iterator[None]:
        """Inside, the block computes with the weights that were replaced."""
        now = {name: linear_of(self.module, name).weight.data for name in self._replaced}
        for name, W in self._replaced.items():
            linear_of(self.module, name).weight.data = W
        try:
            yield
        finally:
            for name, W in now.items():
                linear_of(self.module, name).weight.data = W
