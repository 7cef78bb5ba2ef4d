"""One operator for every device and size, opaque to torch.compile: `llmq::packed_linear`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from llmq_kernels import reference
from llmq_kernels.choose import COUNTERS, Device, Problem, tile_for
from llmq_kernels.cpu_native import NativeMatmul, supports
from llmq_kernels.layout import PackedWeight

_OLDEST_ARCH = 80  # asynchronous copies and bfloat16 arithmetic began there


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor) -> Tensor:
    """Return x @ Wᵀ + bias: [*batch, out] for x [*batch, in].

    Args:
        counters: `new_counters` of the weight's device, kept by the layer. Eager calls may run at once on any number
            of streams; a captured CUDA graph must not replay while anything else runs its layers.
    """
    return _packed_linear(
        reference.permuted(autocast(x), weight), list(weight.words), weight.grid, bias, counters,
        weight.bits, weight.group_size, weight.symmetric,
    )  # fmt: skip


def packed_linear_now(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor) -> Tensor:
    """Return what `packed_linear` returns, without the dispatch of an operator, which takes 40 us of a CPU.

    It has no gradient, and nothing that traces operators sees it.
    """
    return run(reference.permuted(x, weight), weight, bias, counters)


def autocast(x: Tensor) -> Tensor:
    """Return x as torch.autocast hands it to a matmul."""
    kind = x.device.type
    if kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind):  # other kinds may not know autocast
        return x.to(torch.get_autocast_dtype(kind))
    return x


def new_counters(device: torch.device | str) -> Tensor:
    """Return the counters that a layer keeps between calls on GPUs. They are zeros again after every call."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@torch.library.custom_op(
    "llmq::packed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] words, Tensor grid, Tensor? bias, Tensor counters, "
    "int bits, int group_size, bool symmetric) -> Tensor",
)
def _packed_linear(
    x: Tensor,
    words: list[Tensor],
    grid: Tensor,
    bias: Tensor | None,
    counters: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> Tensor:
    return run(x, PackedWeight(tuple(words), grid, bits, group_size, x.shape[-1], symmetric), bias, counters)


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor) -> Tensor:
    """Multiply x, whose features are in the order of the weight's columns."""
    if x.is_cpu:
        weight = replace(weight, permutation=None)
        return NativeMatmul(weight, bias)(x) if supports(x, weight) else reference.matmul(x, weight, bias)
    if not x.is_cuda:
        return reference.matmul(x, replace(weight, permutation=None), bias)
    if x.device.index == torch.cuda.current_device():
        return launched(x, weight, bias, counters)
    with torch.cuda.device(x.device):
        return launched(x, weight, bias, counters)


def launched(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor) -> Tensor:
    """Multiply x on the current GPU, or in plain torch there."""
    rows = x.reshape(-1, x.shape[-1])
    problem = problem_of(rows, weight)
    if not has_kernel(problem, x.device):
        return reference.matmul(x, replace(weight, permutation=None), bias)
    if len(rows) == 0:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    y = _on_gpu(rows.contiguous(), weight, bias, counters, problem)
    return y.view(*x.shape[:-1], y.shape[-1])


def has_kernel(problem: Problem, device: torch.device) -> bool:
    """Tell if a kernel takes the problem on this GPU. If none does, warn once."""
    if problem.has_kernel and describe(device).arch >= _OLDEST_ARCH:
        return True
    _warn(problem)
    return False


@cache
def _warn_once(why: str) -> None:
    warnings.warn(f"llmq: {why}, so this layer runs in plain torch, which is slow", stacklevel=2)


def _warn(problem: Problem) -> None:
    if problem.dtype not in ("float16", "bfloat16"):
        _warn_once(f"the kernels take float16 and bfloat16, not {problem.dtype}")
    elif not problem.has_kernel:
        _warn_once(f"the kernels take groups whose size is a power of two from 16 on, not {problem.group_size}")
    else:
        _warn_once("this GPU is older than those that the kernels are made for (sm_80)")


@_packed_linear.register_fake
def _(x: Tensor, _words: list[Tensor], grid: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], grid.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, words, grid, _bias, _counters, bits, group_size, symmetric = inputs
    ctx.save_for_backward(grid, *words)
    ctx.layout = bits, group_size, x.shape[-1], symmetric


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """Return the gradient of x alone. The weight is frozen; layers below it (LoRA, soft prompts) may learn."""
    grid, *words = ctx.saved_tensors
    dx = dy @ reference.dequantize(PackedWeight(tuple(words), grid, *ctx.layout), dy.dtype)
    return dx, [None] * len(words), *[None] * 6


_packed_linear.register_autograd(_backward, setup_context=_keep)


def problem_of(x: Tensor, weight: PackedWeight) -> Problem:
    """Describe x [M, K] times the weight for `choose`."""
    sizes = len(x), weight.out_features, weight.in_features
    return _problem(weight.bits, weight.group_size, weight.symmetric, x.dtype, *sizes)


@lru_cache(maxsize=4096)
def _problem(bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, *sizes: int) -> Problem:
    return Problem(bits, group_size, symmetric, str(dtype).removeprefix("torch."), *sizes)


def _on_gpu(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor, problem: Problem) -> Tensor:
    from llmq_kernels.dequantize_matmul import dequantize_matmul  # Triton is imported where it runs, not before
    from llmq_kernels.packed_matmul import packed_matmul

    tile = tile_for(describe(x.device), problem)
    if tile is None:
        return dequantize_matmul(x, weight, bias)
    return packed_matmul(x, weight, bias, own(counters), tile)


def own(counters: Tensor) -> Tensor:
    """Return the layer's counters on the default stream and in graphs, else fresh ones: another call may run."""
    stream = torch.cuda.current_stream(counters.device)
    if stream == torch.cuda.default_stream(counters.device) or torch.cuda.is_current_stream_capturing():
        return counters
    return torch.zeros_like(counters)


@cache
def describe(device: torch.device) -> Device:
    """Describe the GPU for `choose`."""
    p = torch.cuda.get_device_properties(device)
    return Device(p.name, p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)
