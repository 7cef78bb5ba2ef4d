"""Runs all experts of a block in two matmuls on a GPU, if they are packed in one way.

    experts.{0 … E-1}.gate_proj, up_proj   ──►  one stack [E, 2 i, h]    The linears' words become views of the stacks,
    experts.{0 … E-1}.down_proj            ──►  one stack [E, h, i]      so memory holds them once.

On a CPU, and where gradients flow, the experts run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmq_kernels import ExpertWeights, new_counters, routed_linear, stack, stack_experts
from llmq_kernels.choose import Problem
from llmq_kernels.op import has_kernel
from torch import Tensor

from llmq.models.experts import (
    GATE,
    Routed,
    expert_of,
    finished,
    gated,
    layout_of,
    layouts,
    linears_of,
    routed,
    run_experts,
    summed,
)
from llmq.runtime.packed_linear import PackedLinear


@dataclass(frozen=True)
class _Stack:
    """A linear of each expert, or two that are one matmul."""

    weights: ExpertWeights
    bias: Tensor | None  # [E, out]

    @classmethod
    def of(cls, experts: Sequence[Sequence[PackedLinear]]) -> _Stack | None:
        """Stack linears, of which each expert has the same number. None if they are not packed in one way."""
        merged = [stack([linear.packed for linear in linears]) for linears in experts]
        biases = [linear.bias for linears in experts for linear in linears]
        alike = [weight for weight in merged if weight is not None]
        weights = stack_experts(alike) if len(alike) == len(experts) else None
        if weights is None or len({bias is None for bias in biases}) > 1:
            return None
        given = [bias for bias in biases if bias is not None]
        return cls(weights, torch.cat(given).view(len(experts), -1) if given else None)

    def share(self, experts: Sequence[Sequence[PackedLinear]]) -> None:
        """Let the linears have views of these words. The grid of one of two rows of linears would be a copy."""
        for expert, linears in enumerate(experts):
            start = 0
            for linear in linears:
                stop = start + linear.out_features
                view, start = self.weights.expert(expert, start, stop), stop
                for i, words in enumerate(view.words):
                    setattr(linear, f"words{i}", words)
                if len(linears) == 1:
                    linear.grid = view.grid
                _ = linear.packed  # it holds the tensors that it had until it is asked again


class GroupedForward:
    """The forward of a module of experts. It makes the stacks when they are needed, and again after a change."""

    def __init__(self, module: Any) -> None:
        self.module, self._is_fresh = module, False
        self._stacks: tuple[_Stack, _Stack] | None = None
        self._words: list[tuple[PackedLinear, Tensor]] = []
        """Of the first and the last expert: accelerate puts others in their place, and tells nobody."""

    def __reduce__(self) -> Any:
        return GroupedForward, (self.module,)

    @property
    def stacks(self) -> tuple[_Stack, _Stack] | None:
        """The stacks of the linears before and after the activation; None if these cannot be stacked."""
        if not self._is_fresh or any(linear.get_buffer("words0") is not words for linear, words in self._words):
            self._stacks, self._is_fresh = None, True
            self._stacks = self._made()
        return self._stacks

    def _made(self) -> tuple[_Stack, _Stack] | None:
        layout = layout_of(self.module)
        assert layout is not None
        experts = [expert_of(self.module, expert) for expert in range(layout.experts)]
        linears: Any = [[expert.get_submodule(name) for name in linears_of(layout)] for expert in experts]
        if not all(isinstance(linear, PackedLinear) for each in linears for linear in each):
            return None
        if any(linear.rounds_inputs or linear.biases is not None for each in linears for linear in each):
            return None  # the kernel takes inputs as they are, and zero points that are codes
        self._counters = new_counters(linears[0][0].grid.device)
        for linear in (linear for each in linears for linear in each):
            linear.on_change = self._forget
        before, after = [each[:-1] for each in linears], [each[-1:] for each in linears]
        first = _Stack.of(before)
        last = None if first is None else _Stack.of(after)
        if first is None or last is None:
            return None
        first.share(before)
        last.share(after)
        self._words = [(linear, linear.get_buffer("words0")) for each in (linears[0], linears[-1]) for linear in each]
        return first, last

    def _forget(self) -> None:
        self._stacks, self._is_fresh = None, False

    def __call__(self, *args: Any) -> Tensor:
        learning = torch.is_grad_enabled() and args[0].requires_grad
        stacks = self.stacks if takes(args[0]) and not learning else None
        return run_experts(self.module, *args) if stacks is None else self._grouped(args, *stacks)

    def _grouped(self, args: tuple[Any, ...], first: _Stack, last: _Stack) -> Tensor:
        module, layout = self.module, layout_of(self.module)
        assert layout is not None
        entering: Routed = routed(module, args)
        index, scores = entering.index, entering.scores
        if scores is not None:
            scores = scores.masked_fill(index >= layout.experts, 0)  # an expert that does not exist stands for none
            index = index.clamp(max=layout.experts - 1)
        outputs = routed_linear(entering.X, first.weights, index, first.bias, None, self._counters).flatten(0, 1)
        has_gate = f"{GATE}.weight" in layout.places
        inner = gated(module, *outputs.chunk(2, -1)) if has_gate else module.act_fn(outputs)
        if getattr(module, "has_post_expert_norm", False):  # comes before the scores
            outputs = finished(module, routed_linear(inner, last.weights, index, last.bias, None, self._counters))
            outputs = outputs if scores is None else outputs * scores[..., None]
        else:
            outputs = routed_linear(inner, last.weights, index, last.bias, scores, self._counters)
        return summed(layout, args, entering, outputs)

    def waits(self, dtype: torch.dtype) -> bool:
        """Return whether the forward waits for the GPU, to learn which experts have rows."""
        layout, stacks = layout_of(self.module), self.stacks
        if stacks is None or layout is None or layout.scored:
            return True
        kinds = [each.weights for each in stacks]
        name = str(dtype).removeprefix("torch.")
        problems = [Problem(w.bits, w.group_size, w.symmetric, name, 1, w.out_features, w.in_features) for w in kinds]
        return not all(has_kernel(problem, kinds[0].device) for problem in problems)


def takes(X: Tensor) -> bool:
    """Return whether there are kernels where a tensor is."""
    return X.is_cuda


def group_experts(model: Any) -> None:
    """Let all experts of a block run together wherever they can. `load_state_dict` and `to` may follow."""
    for name in layouts(model):
        module = model.get_submodule(name)
        module.forward = GroupedForward(module)
        if takes(next(module.buffers(), torch.empty(0))):
            _ = module.forward.stacks  # now: a decode step is made for tensors that stay where they are


def waits_for_gpu(model: Any) -> bool:
    """Return whether a forward waits for the GPU to learn which experts run: no graph can replay that."""
    forwards = [model.get_submodule(name).forward for name in layouts(model)]
    return any(not isinstance(forward, GroupedForward) or forward.waits(model.dtype) for forward in forwards)
