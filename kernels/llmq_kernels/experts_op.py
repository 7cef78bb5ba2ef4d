"""One operator for the experts of a layer, on every device, opaque to torch.compile: `llmq::routed_linear`."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llmq_kernels import reference
from llmq_kernels.choose import Device, Problem, Tile, rule
from llmq_kernels.experts import ExpertWeights, tiles_for
from llmq_kernels.op import autocast, describe, has_kernel, own, run

# Pairs per expert that a tile has room for, to the average: the load is uneven. A second tile dequantizes all again,
# and costs more than a taller one. Not measured.
_UNEVEN = 1.5
_TALLEST = 64


def routed_linear(
    x: Float[Tensor, "rows in"],
    weights: ExpertWeights,
    index: Int[Tensor, "tokens k"],
    bias: Float[Tensor, "experts out"] | None,
    scores: Float[Tensor, "tokens k"] | None,
    counters: Tensor,
) -> Float[Tensor, "tokens k out"]:
    """Return scores[t, j] * (x[t] @ Wᵀ + bias) of expert index[t, j], for all choices j of all tokens t.

    On a GPU nothing waits for it, all sums are in a fixed order, and an index out of range becomes the nearest one.

    Args:
        x: a row for each token, which all its choices share; or one for each of its k choices, row t * k + j.
        counters: `new_counters` of the weights' device, kept by the layer, as in `packed_linear`.

    Raises ValueError if x has neither T nor T * k rows; on a CPU, if an expert does not exist.
    """
    x, pairs = autocast(x), index.flatten()
    if len(x) not in (len(index), len(pairs)):
        raise ValueError(f"{len(index)} tokens with {index.shape[1]} experts each have no {len(x)} rows of inputs")
    if weights.permutation is not None:  # each expert has its own order, so each pair gets its own row
        x = x if len(x) == len(pairs) else x.repeat_interleave(index.shape[1], 0)
        x = x.gather(1, weights.permutation.index_select(0, pairs))
    return _routed_linear(
        x, list(weights.words), weights.grid, index, bias, scores, counters,
        weights.bits, weights.group_size, weights.symmetric,
    )  # fmt: skip


@torch.library.custom_op(
    "llmq::routed_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] words, Tensor grid, Tensor index, Tensor? bias, Tensor? scores, Tensor counters, "
    "int bits, int group_size, bool symmetric) -> Tensor",
)
def _routed_linear(
    x: Tensor,
    words: list[Tensor],
    grid: Tensor,
    index: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    counters: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> Tensor:
    weights = ExpertWeights(tuple(words), grid, bits, group_size, x.shape[1], symmetric)
    if not x.is_cuda:
        return reference.routed_matmul(x, weights, index, bias, scores, lambda x, w, b: run(x, w, b, counters))
    with torch.cuda.device(x.device):
        return launched(x, weights, index, bias, scores, counters)


def launched(
    x: Tensor, weights: ExpertWeights, index: Tensor, bias: Tensor | None, scores: Tensor | None, counters: Tensor
) -> Tensor:
    """Multiply x on the current GPU, or in plain torch there."""
    dtype, sizes = str(x.dtype).removeprefix("torch."), (weights.out_features, weights.in_features)
    problem = Problem(weights.bits, weights.group_size, weights.symmetric, dtype, len(index), *sizes)
    if index.numel() == 0 or not has_kernel(problem, x.device):
        return reference.routed_matmul(x, weights, index, bias, scores)
    from llmq_kernels.packed_experts import packed_experts  # Triton is imported where it runs, not before

    tile = rule_for_experts(describe(x.device), problem, len(weights), index.shape[1])
    x, index = x.contiguous(), index.contiguous()
    bias, scores = (None if tensor is None else tensor.contiguous() for tensor in (bias, scores))
    return packed_experts(x, weights, index, bias, scores, own(counters), tile)


@_routed_linear.register_fake
def _(x: Tensor, _words: list[Tensor], grid: Tensor, index: Tensor, *_: object) -> Tensor:
    return x.new_empty(*index.shape, grid.shape[2])


@lru_cache(maxsize=4096)
def rule_for_experts(device: Device, problem: Problem, experts: int, k: int) -> Tile:
    """Return the tile for problem.M tokens that go to k experts each. Its weights' rows are problem.N of each expert.

    It is the dense rule's for as many tokens as an expert has, with the tiles' rows as if they were of one weight.
    """
    pairs = problem.M * k
    M = min(_TALLEST, math.ceil(_UNEVEN * pairs / experts))
    tile = rule(device, replace(problem, M=M))
    assert tile is not None
    tiles = tiles_for(pairs, experts, tile.BM)
    # An odd number of times N divides by 16 where N does, as the rule asks.
    tile = rule(device, replace(problem, M=M, N=problem.N * (tiles | 1)))
    assert tile is not None
    return tile
