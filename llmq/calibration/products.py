"""Products of inputs, summed in float32.

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
        torch.addmm(total, A, B, out_dtype=torch.float32, out=total)


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
