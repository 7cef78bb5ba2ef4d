"""One operator for every device and size, opaque to torch.compile: `llmq::packed_linear`."""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor

from llmq_kernels import reference
from llmq_kernels.choose import COUNTERS, Device, Problem, Tile, choose, tables_for
from llmq_kernels.layout import PackedWeight

_KERNEL_DTYPES = (torch.float16, torch.bfloat16)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor) -> Tensor:
    """x @ Wᵀ + bias: [*batch, out] for x [*batch, in].

    Args:
        counters: `new_counters` of the weight's device, kept by the layer. A layer must not run twice at the same time
            in captured CUDA graphs; eager calls may, on as many streams as they like.
    """
    return _packed_linear(
        reference.permuted(x, weight), list(weight.words), weight.grid, bias, counters,
        weight.bits, weight.group_size, weight.symmetric,
    )  # fmt: skip


def new_counters(device: torch.device | str) -> Tensor:
    """What a layer keeps between calls: zeros, and zeros again after every call."""
    return torch.zeros(COUNTERS if torch.device(device).type == "cuda" else 0, dtype=torch.int32, device=device)


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
    weight = PackedWeight(tuple(words), grid, bits, group_size, x.shape[-1], symmetric)
    if not x.is_cuda or x.dtype not in _KERNEL_DTYPES or not has_kernel(weight):
        return reference.matmul(x, weight, bias)
    with torch.cuda.device(x.device):
        y = _on_gpu(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, counters)
    return y.view(*x.shape[:-1], y.shape[-1])


@_packed_linear.register_fake
def _(x: Tensor, _words: list[Tensor], grid: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], grid.shape[1])


def has_kernel(weight: PackedWeight) -> bool:
    """Whether the groups are such that planes never straddle them: a power of two from 16 on, or the whole row."""
    size = weight.group_size
    return size == weight.in_features or (size >= 16 and size & (size - 1) == 0)


def _on_gpu(x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor) -> Tensor:
    from llmq_kernels.dequantize_matmul import dequantize_matmul  # Triton is imported where it runs, not before
    from llmq_kernels.packed_matmul import packed_matmul

    device = describe(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    problem = Problem(
        weight.bits, weight.group_size, weight.symmetric, dtype, len(x), weight.out_features, weight.in_features
    )
    if len(x) == 0:
        return x.new_empty(0, weight.out_features)
    tile = _tile(device, problem)
    if tile is None:
        return dequantize_matmul(x, weight, bias)
    return packed_matmul(x, weight, bias, _own(counters), tile)


@lru_cache(maxsize=4096)
def _tile(device: Device, problem: Problem) -> Tile | None:
    return choose(device, problem, tables_for(device.name, device.arch))


def _own(counters: Tensor) -> Tensor:
    """The layer's on the default stream and in graphs; fresh ones elsewhere, where another call may be under way."""
    stream = torch.cuda.current_stream(counters.device)
    if stream == torch.cuda.default_stream(counters.device) or torch.cuda.is_current_stream_capturing():
        return counters
    return torch.zeros_like(counters)


@cache
def describe(device: torch.device) -> Device:
    """The GPU as `choose` wants to know it."""
    p = torch.cuda.get_device_properties(device)
    return Device(p.name, p.major * 10 + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)
