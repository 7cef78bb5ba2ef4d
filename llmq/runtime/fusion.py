"""Puts C functions in the place of recorded operators, where they are faster on a CPU.

They are: products with packed weights; products with dense weights that are exact in 16 bits; RMS norms; and the rotation
of queries and keys. Only the last digits of the results differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from llmq_kernels import PackedWeight, cpu_native
from torch import Tensor

from llmq.runtime.recording import Call, Recording, Ref

# Smaller matrices stay in the cache, where torch is as fast.
_LARGE = 1 << 22
_FEW_ROWS = 4

Rule = Callable[["_Context", Call], Call | None]


class _Context:
    """What rules ask of a recording."""

    def __init__(self, recording: Recording, dense: dict[int, cpu_native.NativeLinear | None]) -> None:
        self.recording, self.dense = recording, dense
        self.made = {number: call for call in recording.calls for number in call.results}

    def constant(self, leaf: Any) -> Tensor | None:
        return self.recording.constants.get(leaf.number) if isinstance(leaf, Ref) else None

    def call(self, leaf: Any, name: str) -> Call | None:
        """Return the call that made an argument, if it is one of this operator."""
        call = self.made.get(leaf.number) if isinstance(leaf, Ref) else None
        return call if call is not None and _name(call) == name else None

    def plain(self, leaf: Any) -> bool:
        """Tell if an argument is float32, with no gaps in memory along its dimensions longer than 1."""
        like, step = self.recording.likes[leaf.number], 1
        for size, stride in reversed([pair for pair in zip(like.shape, like.strides, strict=True) if pair[0] > 1]):
            if stride != step:
                return False
            step *= size
        return like.dtype == torch.float32

    def rows(self, leaf: Any) -> int:
        shape = self.recording.likes[leaf.number].shape
        return torch.Size(shape[:-1]).numel()


def fused(recording: Recording, dense: dict[int, cpu_native.NativeLinear | None]) -> Recording:
    """Return the recording with faster calls. `dense` keeps copies of dense weights between recordings of one model."""
    if cpu_native.library() is None:
        return recording
    context = _Context(recording, dense)
    calls = [
        next((new for rule in _RULES if (new := rule(context, call)) is not None), call) for call in recording.calls
    ]
    return replace(recording, calls=calls).without_unused()


def _name(call: Call) -> str:
    return call.func._schema.name.partition("::")[2]


def _with(call: Call, quick: Callable[..., Any], *args: Any) -> Call:
    return replace(call, quick=quick, args=args, kwargs={})


def _packed_linear(context: _Context, call: Call) -> Call | None:
    if _name(call) != "packed_linear":
        return None
    x, words, grid, bias, _counters, bits, group_size, symmetric = call.args
    tensors = [context.constant(leaf) for leaf in (*words, grid)]
    given = None if bias is None else context.constant(bias)
    if any(tensor is None or not tensor.is_cpu for tensor in tensors) or (bias is not None and given is None):
        return None
    K = context.recording.likes[x.number].shape[-1]
    weight = PackedWeight(tuple(t for t in tensors[:-1] if t is not None), tensors[-1], bits, group_size, K, symmetric)  # pyright: ignore[reportArgumentType]
    if not cpu_native.supports(torch.empty(0, dtype=context.recording.likes[x.number].dtype), weight):
        return None
    return _with(call, cpu_native.NativeMatmul(weight, given), x)


def _dense_linear(context: _Context, call: Call) -> Call | None:
    if _name(call) != "linear" or context.rows(call.args[0]) > _FEW_ROWS:
        return None
    W, *bias = (context.constant(leaf) for leaf in call.args[1:])
    if W is None or W.numel() < _LARGE or (bias and bias[0] is None and call.args[2] is not None):
        return None
    if W.data_ptr() not in context.dense:
        context.dense[W.data_ptr()] = cpu_native.NativeLinear.of(W, *bias)
    native = context.dense[W.data_ptr()]
    return None if native is None else _with(call, native, call.args[0])


def _rms_norm(context: _Context, call: Call) -> Call | None:
    """weight * (x * rsqrt(mean(x²) + eps))"""
    if _name(call) != "mul":
        return None
    for scaled, weight in (call.args, call.args[::-1]):
        W, product = context.constant(weight), context.call(scaled, "mul")
        if W is None or W.ndim != 1 or W.dtype != torch.float32 or product is None:
            continue
        x, root = product.args
        shifted = context.call(step.args[0], "add") if (step := context.call(root, "rsqrt")) else None
        mean = context.call(shifted.args[0], "mean") if shifted and isinstance(shifted.args[1], float) else None
        square = context.call(mean.args[0], "pow") if mean and mean.args[1:] == ([-1], True) else None
        size = context.recording.likes[x.number].shape[-1] if isinstance(x, Ref) else 0
        if shifted and square and square.args == (x, 2) and size == W.numel() and context.plain(x):
            return _with(call, cpu_native.NativeRmsNorm(W, shifted.args[1]), x)
    return None


def _rotation(context: _Context, call: Call) -> Call | None:
    """x * cos + cat(-second half of x, first half of x) * sin"""
    if _name(call) != "add" or call.kwargs or not all(context.call(leaf, "mul") for leaf in call.args):
        return None
    (x, cos), (turned, sin) = (context.made[leaf.number].args for leaf in call.args)
    halves = cat.args[0] if (cat := context.call(turned, "cat")) and cat.args[1:] == (-1,) else []
    negative = context.call(halves[0], "neg") if len(halves) == 2 else None
    second = context.call(negative.args[0], "slice") if negative else None
    first = context.call(halves[1], "slice") if negative else None
    if not (first and second) or not all(isinstance(leaf, Ref) for leaf in (x, cos, sin)):
        return None
    shape = context.recording.likes[x.number].shape
    half, dim, last = shape[-1] // 2, len(shape) - 1, {shape[-1], torch.iinfo(torch.int64).max}
    if first.args != (x, dim, 0, half) or second.args[:3] != (x, dim, half) or second.args[3] not in last:
        return None
    sizes = {torch.Size(context.recording.likes[leaf.number].shape).numel() for leaf in (cos, sin)}
    if sizes != {shape[-1]} or not all(map(context.plain, (x, cos, sin))):
        return None
    return _with(call, cpu_native.rotate, x, cos, sin)


_RULES: tuple[Rule, ...] = (_packed_linear, _dense_linear, _rms_norm, _rotation)
