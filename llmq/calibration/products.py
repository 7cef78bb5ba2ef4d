"""Products of inputs, summed in float32, and which rows of inputs have some.

Factors of 16 bits have exact products in float32; only the sum rounds.

    bfloat16 or float16 on a GPU    tensor cores, with float32 results
    bfloat16 on a CPU               oneDNN, in the mode that `bfloat16_products` chooses
    float32                         all bits, everywhere
"""

from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from llmq.core.device import bfloat16_products

# Only the lower triangle of XᵀX is computed, in strips of this many columns. On a CPU: a third less arithmetic at 1536
# columns and still wide enough for full matmul speed (2-core AVX2 machine, 2026-11: 256 and 512 alike, 128 a tenth
# slower). A GPU needs large products: three strips for 11008 columns are two thirds of the arithmetic (not measured).
_STRIP, _GPU_STRIP = 256, 4096


def add_lower(H: Float[Tensor, "n n"], X: Float[Tensor, "tokens n"]) -> None:
    """Add the lower triangle of XᵀX to H, in float32."""
    on_cpu = H.device.type == "cpu"
    with bfloat16_products() if on_cpu and X.dtype == torch.bfloat16 else nullcontext():
        X = X.float() if on_cpu else X
        for start, stop in _strips(H):
            add_product(H[start:stop, :stop], X[:, start:stop].T, X[:, :stop])


def add_product(total: Float[Tensor, "n m"], A: Float[Tensor, "n k"], B: Float[Tensor, "k m"]) -> None:
    """Add A B to a float32 total. On a GPU, factors in 16 bits have exact products there."""
    if A.dtype == torch.float32:
        total.addmm_(A, B)
    else:
        # Not torch.addmm, which would save a pass over the total: in torch 2.8 it refused totals of another dtype than
        # its factors, and when that changed was not tried.
        total.add_(torch.mm(A, B, out_dtype=torch.float32))


def mirrored(H: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Copy the lower triangle of H to above the diagonal, in place, and return H."""
    for start, stop in _strips(H):
        square = H[start:stop, start:stop]  # both halves were summed, but they may differ in the last bit
        square.copy_(square.tril() + square.tril(-1).T)
        H[start:stop, stop:] = H[stop:, start:stop].T
    return H


def _strips(H: Tensor) -> list[tuple[int, int]]:
    size = _STRIP if H.device.type == "cpu" else _GPU_STRIP
    return [(start, min(start + size, len(H))) for start in range(0, len(H), size)]


def finite_rows(tensors: list[Tensor]) -> tuple[list[Tensor], int | Tensor]:
    """Return the tensors without the rows of tokens that are not finite in all of them, and the number of the others.

    On a GPU these rows are set to zero, and the number stays there: it is waited for when it is read.
    """
    if tensors[0].device.type != "cpu":
        finite = torch.stack([torch.isfinite(tensor.sum(1, dtype=torch.float32)) for tensor in tensors]).all(0)
        return [torch.where(finite[:, None], tensor, 0) for tensor in tensors], finite.sum()
    # One reduction finds the rare bad batch: a sum is finite only if every term is.
    if not all(bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors):
        finite = torch.stack([torch.isfinite(tensor).all(1) for tensor in tensors]).all(0)
        tensors = [tensor[finite] for tensor in tensors]
    return tensors, len(tensors[0])
