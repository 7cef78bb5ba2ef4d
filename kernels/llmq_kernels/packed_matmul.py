"""y = x Wᵀ + bias straight from packed words, for few to a few hundred tokens.

    x [M, K]      words [N, K * bits / 16]                acc [BN, BM] = W x^T
       .───────.     .──────┬──────┬──────.  split 0, 1, 2   one program: BN rows, BM tokens, one split of K
    BM │       │  BN │block │block │block │
       '───────'     '──────┴──────┴──────'

W is the LEFT operand of every tl.dot: its rows fill the long side of a tensor-core instruction and tokens the short
one, which is 8, so that one token wastes little. A block's planes are dequantized in registers, where cp.async and
ldmatrix have put them in the operand's own layout, and a group's product is scaled once, in float32.

With few tokens there are too few tiles to keep the memory busy, so K is split. Each split writes float32 sums to
`partial`; the last one to arrive at a tile adds them in a fixed order: one launch, the same bits every time.
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

from llmq_kernels.choose import Tile
from llmq_kernels.experts import ExpertWeights
from llmq_kernels.layout import PackedWeight, block_of
from llmq_kernels.planes import in_two, low_width, plane_values, planes_of


@triton.jit
def grid_word(pointer, SYMMETRIC: tl.constexpr):
    """Return (scale, zero) as float32. The zero of a symmetric weight is known and not read."""
    word = tl.load(pointer)
    if SYMMETRIC:
        scale = word.to(tl.float32, bitcast=True)
        zero = scale
    else:
        scale = (word & -256).to(tl.float32, bitcast=True)
        zero = ((word & 255) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0  # 2**23 + zero - 2**23
    return scale, zero


@triton.jit
def sum_of_splits(acc, kept, partial, at, split, size, counter):
    """Store this split's sums. Return those of all splits, and where they are kept: in the last program only.

    `at`: where they are in the sums of one split, which are `size` numbers.
    """
    tl.store(partial + split * size + at, acc, mask=kept)
    tl.debug_barrier()  # all of this program's sums are out before it is counted
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1
    if last:
        acc = tl.zeros_like(acc)
        for s in range(tl.num_programs(1)):
            acc += tl.load(partial + s * size + at, mask=kept, other=0.0, cache_modifier=".cg")
        tl.store(counter, 0)
    else:
        kept = kept & False
    return acc, kept


@triton.jit
def grid_at(grid, row, k, N, K, GROUP: tl.constexpr, EVEN_K: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return (scale, zero) of the group of input k in these rows."""
    group = 0 if GROUP == 0 else k // GROUP
    if not EVEN_K and GROUP != 0:  # the padding of the last block has no group of its own
        group = tl.minimum(group, K // GROUP - 1)
    return grid_word(grid + group * N + row, SYMMETRIC)


@triton.jit
def sum_of_products(
    x, words, tops, grid, x_row, m, row, M, N, K, word_stride, top_stride, split, blocks, blocks_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, SYMMETRIC: tl.constexpr, EVEN_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    FOLD: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return W x^T of a tile over one split of K, float32 [BN, BM].

    Args:
        x_row: the rows [BM] of x; those whose m is M or more are zeros and not read.
        row: the rows [BN] of W.
    """
    PER_WORD: tl.constexpr = 16 // low_width(BITS)
    PLANES: tl.constexpr = planes_of(BITS)
    SETS: tl.constexpr = PLANES // PER_WORD
    BLOCK: tl.constexpr = PLANES * PLANE
    tl.static_assert(PLANE % CHUNK == 0)
    DTYPE: tl.constexpr = x.dtype.element_ty
    c = tl.arange(0, CHUNK)
    word_row = words + row[:, None] * word_stride + c[None, :]
    top_row = tops + row[:, None] * top_stride + c[None, :]
    x_column = x + x_row.to(tl.int64)[None, :] * K + c[:, None]
    token = (m < M)[None, :]
    first = split * blocks_per_split
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    last = tl.minimum(first + blocks_per_split, blocks)
    for step in tl.range(first * (PLANE // CHUNK), last * (PLANE // CHUNK), num_stages=STAGES):
        block = step if CHUNK == PLANE else step * CHUNK // PLANE
        start = 0 if CHUNK == PLANE else tl.multiple_of(step * CHUNK % PLANE, CHUNK)
        top = tl.load(top_row + block * PLANE + start) if in_two(BITS) else 0
        word = tl.load(word_row + block * (SETS * PLANE) + start)
        for p in tl.static_range(PLANES):
            if p > 0 and p % PER_WORD == 0:
                word = tl.load(word_row + (block * SETS + p // PER_WORD) * PLANE + start)
            if p == 0 or (GROUP != 0 and p * PLANE % GROUP == 0):
                scale, zero = grid_at(grid, row, block * BLOCK + p * PLANE, N, K, GROUP, EVEN_K, SYMMETRIC)
                if p == 0 or not FOLD:
                    part = tl.zeros((BN, BM), dtype=tl.float32)
            k = block * BLOCK + p * PLANE + start
            inside = token if EVEN_K else token & (k + c < K)[:, None]
            tokens = tl.load(x_column + k, mask=inside, other=0.0)
            W = plane_values(word, top, zero, p, BITS, SYMMETRIC, DTYPE, ASM)
            if FOLD:
                W = W * scale.to(DTYPE)[:, None]
            part = tl.dot(W, tokens, part)
            if p == PLANES - 1 or (not FOLD and GROUP != 0 and (p + 1) * PLANE % GROUP == 0):
                acc += part if FOLD else part * scale[:, None]
    return acc


# The number of tokens changes from call to call, blocks from layer to layer: one binary for all of them.
#
#   x, y         [M, K], [M, N]; bias: [N]; words, tops, grid: as in PackedWeight
#   partial      float32 [splits, M, N], used if SPLIT
#   counters     int32, zero before and after, one for each tile, used if SPLIT
#   GROUP        inputs per group, 0 for one group per row
#   FOLD         scale the weights, not the sums (for tall BM)
@triton.jit(do_not_specialize=["M", "blocks", "blocks_per_split"])
def packed_matmul_kernel(
    x, words, tops, grid, bias, y, partial, counters,
    M, N, K, word_stride, top_stride, blocks, blocks_per_split,
    BITS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, SYMMETRIC: tl.constexpr,
    EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    FOLD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiply one tile. Program: tile of N, split of K, tile of M."""
    tile_n, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n, m = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1)  # rows past the end are computed from the last one and not stored
    if PDL:  # the previous kernel may still be running: x is not ready before this returns
        tl.extra.cuda.gdc_wait()  # pyright: ignore[reportAttributeAccessIssue]
    acc = sum_of_products(
        x, words, tops, grid, m, m, row, M, N, K, word_stride, top_stride, split, blocks, blocks_per_split,
        BITS, GROUP, PLANE, SYMMETRIC, EVEN_K, BM, BN, CHUNK, STAGES, FOLD, ASM,
    )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    kept = (m < M)[None, :] & (n < N)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT:
        counter = counters + tile_m * tl.num_programs(0) + tile_n
        acc, kept = sum_of_splits(acc, kept, partial, at, split, M * N, counter)
    if HAS_BIAS:
        acc += tl.load(bias + row)[:, None].to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=kept)


def packed_matmul(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, counters: Tensor, tile: Tile, y: Tensor | None = None
) -> Tensor:
    """Launch the kernel, and return y.

    Args:
        x: [M, K], contiguous, float16 or bfloat16, columns in the weight's order.
        bias: [N], or None.
        counters: int32 zeros, at least one for each of the launch's tiles if K is split; zeros again afterwards.
        y: [M, N] to write to.
    """
    (M, K), N = x.shape, weight.out_features
    if y is None:
        y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    words, tops = weight.words[0], weight.words[-1]
    blocks = tops.shape[1] // weight.plane
    split = tile.splits > 1
    partial = torch.empty(tile.splits, M, N, dtype=torch.float32, device=x.device) if split else counters
    options = {"launch_pdl": True} if tile.pdl else {}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    packed_matmul_kernel[(triton.cdiv(N, tile.BN), tile.splits, triton.cdiv(M, tile.BM))](
        x, words, tops, weight.grid, bias if bias is not None else x, y, partial, counters,
        M, N, K, words.shape[1], tops.shape[1], blocks, triton.cdiv(blocks, tile.splits),
        BITS=weight.bits, GROUP=group_of(weight), PLANE=weight.plane, SYMMETRIC=weight.symmetric,
        EVEN_K=block_of(weight.bits, weight.plane) * blocks == K, HAS_BIAS=bias is not None, SPLIT=split,
        BM=tile.BM, BN=tile.BN, CHUNK=tile.chunk, STAGES=tile.stages, FOLD=tile.fold, ASM=uses_asm(x), PDL=tile.pdl,
        num_warps=tile.warps, num_stages=tile.stages, **options,
    )  # fmt: skip
    return y


def group_of(weight: PackedWeight | ExpertWeights) -> int:
    """Return GROUP of the kernels: 0 stands for one group per row of any length."""
    return 0 if weight.group_size == weight.in_features else weight.group_size


def uses_asm(x: Tensor) -> bool:
    """Tell if the kernel may use PTX: on NVIDIA's GPUs. The interpreter and others take the twin."""
    return x.is_cuda and torch.version.hip is None
