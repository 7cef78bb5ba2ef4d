"""y[t, j] = x[t] Wᵀ + bias of expert index[t, j], straight from packed words: packed_matmul for a mixture of experts.

A pair is a token and one of its k choices, number t * k + j. `route_kernel` sorts the pairs by expert into tiles of BM
pairs of one expert each, on the GPU: how many tiles there are is known only there. The launch has as many as there
could be, and those without pairs return at once. So nothing waits for the GPU, and a CUDA graph can replay it.

    index [T, k]   0 2 | 2 1 | 2 0        pairs 0..5       tiles of 2 pairs     expert 0: 0 5
                                                                                expert 1: 3 -
                                                                                expert 2: 1 2,  4 -

Each program multiplies as in packed_matmul: its tokens are rows of x that it gathers, its outputs rows of y. The score
of a pair, if given, multiplies its outputs in float32 before they are rounded, where it costs nothing. The sum over a
token's choices is left to torch: they are in different programs, so a sum here would need atomics or another counter.
"""

# Triton compiles the kernels: their parameters have no Python types, their branches are chosen while compiling.
# pyright: reportMissingParameterType=false, reportPossiblyUnboundVariable=false, reportUnusedVariable=false
# Triton's dialect, whose constants are of no type that a checker knows:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportRedeclaration=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmq_kernels.choose import COUNTERS, Tile
from llmq_kernels.experts import ExpertWeights, tiles_for
from llmq_kernels.layout import block_of
from llmq_kernels.packed_matmul import group_of, sum_of_products, sum_of_splits, uses_asm

_CHUNK = 1024  # pairs that a program of route_kernel looks at together


@triton.jit
def experts_of(index, pair, P, E):
    """Return the experts of these pairs; that of a pair past the end is -1. Indices out of range become the nearest."""
    expert = tl.load(index + pair, mask=pair < P, other=0).to(tl.int32)
    return tl.where(pair < P, tl.minimum(tl.maximum(expert, 0), E - 1), -1)


# table    int32 [count, 1 + BM]: for each tile its expert, or -1 if it has none, then its pairs. P stands for no pair.
@triton.jit(do_not_specialize=["P", "count"])
def route_kernel(index, table, P, E, count, BM: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """Write the tiles of one expert. Program: expert."""
    e, experts = tl.program_id(0), tl.arange(0, EXPERTS)
    sizes = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, P, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        sizes += tl.histogram(experts_of(index, pair, P, E), EXPERTS, mask=pair < P)
    tiles = (sizes + BM - 1) // BM
    first = tl.sum(tl.where(experts < e, tiles, 0))
    size, used = tl.sum(tl.where(experts == e, sizes, 0)), tl.sum(tiles)
    seen = 0
    for start in range(0, P, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        mine = (experts_of(index, pair, P, E) == e).to(tl.int32)
        place = seen + tl.cumsum(mine) - 1
        tl.store(table + (first + place // BM) * (BM + 1) + 1 + place % BM, pair, mask=mine > 0)
        seen += tl.sum(mine)
    for tile in range(first, first + (size + BM - 1) // BM):
        slot = tl.arange(0, BM)
        tl.store(table + tile * (BM + 1), e)
        tl.store(table + tile * (BM + 1) + 1 + slot, slot * 0 + P, mask=(tile - first) * BM + slot >= size)
    for tile in range(used + e, count, E):
        tl.store(table + tile * (BM + 1), -1)


# Further arguments as in packed_matmul_kernel. Of each expert, one after another: words, tops, grid, bias [N].
#
#   x, y     [M, K], [P, N]; pair i reads row i // share of x
#   scores   [P], used if SCORED
#   table    what route_kernel writes; or the experts themselves, int64 [P], if not ROUTED: each pair is a tile
@triton.jit(do_not_specialize=["P", "share", "blocks", "blocks_per_split"])
def packed_experts_kernel(
    x, words, tops, grid, bias, scores, y, partial, counters, table,
    P, share, E, N, K, word_stride, top_stride, blocks, blocks_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, SYMMETRIC: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, SCORED: tl.constexpr, SPLIT: tl.constexpr, ROUTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    FOLD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Multiply one tile. Program: tile of pairs, split of K, tile of N."""
    tile, split, tile_n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, n = tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    if ROUTED:
        e = tl.load(table + tile * (BM + 1))
        if e < 0:
            return
        pair = tl.load(table + tile * (BM + 1) + 1 + slot)
    else:
        e = experts_of(table, tile, P, E)
        pair = tl.where(slot == 0, tile, P)
    e = e.to(tl.int64)  # all experts' words may be more than 2**31
    row = tl.minimum(n, N - 1)
    groups = 1 if GROUP == 0 else K // GROUP
    acc = sum_of_products(
        x, words + e * N * word_stride, tops + e * N * top_stride, grid + e * groups * N,
        pair // share, pair, row, P, N, K, word_stride, top_stride, split, blocks, blocks_per_split,
        BITS, GROUP, PLANE, SYMMETRIC, EVEN_K, BM, BN, CHUNK, STAGES, FOLD, ASM,
    )  # fmt: skip
    kept = (pair < P)[None, :] & (n < N)[:, None]
    at = pair.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT:
        counter = counters + tile * tl.num_programs(2) + tile_n
        acc, kept = sum_of_splits(acc, kept, partial, at, split, P.to(tl.int64) * N, counter)
    if HAS_BIAS:
        acc += tl.load(bias + e * N + row)[:, None].to(tl.float32)
    if SCORED:
        acc *= tl.load(scores + pair, mask=pair < P, other=0.0)[None, :].to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=kept)


def route(index: Tensor, experts: int, BM: int) -> Tensor:
    """Return the table of tiles, int32 [tiles_for, 1 + BM], for the experts [T, k] of each token."""
    P, count = index.numel(), tiles_for(index.numel(), experts, BM)
    table = torch.empty(count, 1 + BM, dtype=torch.int32, device=index.device)
    chunk = min(_CHUNK, max(16, triton.next_power_of_2(P)))
    route_kernel[(experts,)](
        index, table, P, experts, count, BM=BM, CHUNK=chunk, EXPERTS=max(16, triton.next_power_of_2(experts))
    )
    return table


def packed_experts(
    x: Tensor,
    weights: ExpertWeights,
    index: Tensor,
    bias: Tensor | None,
    scores: Tensor | None,
    counters: Tensor,
    tile: Tile,
) -> Tensor:
    """Launch the kernels, and return y [T, k, N].

    Args:
        x: [T, K], the same for all choices of a token, or [T * k, K]; contiguous, float16 or bfloat16, columns in the
            order of the expert's.
        index: int64 [T, k], contiguous: the experts of each token, from 0 to E - 1.
        bias: [E, N], or None.
        scores: [T, k], by which the outputs are multiplied; or None.
        counters: int32 zeros, COUNTERS of them; zeros again afterwards.
    """
    (T, k), P, E = index.shape, index.numel(), len(weights)
    K, N = weights.in_features, weights.out_features
    y = torch.empty(T, k, N, dtype=x.dtype, device=x.device)
    routed = T > 1  # else no expert has two tokens, and each pair may be a tile: a launch less
    table = route(index, E, tile.BM) if routed else index
    words, tops = weights.words[0], weights.words[-1]
    blocks, tiles_n = tops.shape[2] // weights.plane, triton.cdiv(N, tile.BN)
    tiles = len(table) if routed else P
    splits = tile.splits if tiles * tiles_n <= COUNTERS else 1
    partial = torch.empty(splits, P, N, dtype=torch.float32, device=x.device) if splits > 1 else counters
    options = {} if tile.registers is None else {"maxnreg": tile.registers}
    packed_experts_kernel[(tiles, splits, tiles_n)](
        x, words, tops, weights.grid, x if bias is None else bias, x if scores is None else scores, y, partial,
        counters, table,
        P, P // len(x), E, N, K, words.shape[2], tops.shape[2], blocks, triton.cdiv(blocks, splits),
        BITS=weights.bits, GROUP=group_of(weights), PLANE=weights.plane, SYMMETRIC=weights.symmetric,
        EVEN_K=block_of(weights.bits, weights.plane) * blocks == K,
        HAS_BIAS=bias is not None, SCORED=scores is not None,
        SPLIT=splits > 1, ROUTED=routed,
        BM=tile.BM, BN=tile.BN, CHUNK=tile.chunk, STAGES=tile.stages, FOLD=tile.fold, ASM=uses_asm(x),
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return y
