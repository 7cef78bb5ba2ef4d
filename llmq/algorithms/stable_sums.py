"""Sums with the same bits for any number of threads: torch orders the terms of a long sum by the number of threads.

They are float64 tensors without dimensions. On a GPU, to read one is to wait for all work that is queued.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from llmq.algorithms.problem import Problem, Solution

# Rows multiplied by H at once.
_ROWS = 1024
# Weights rounded at once. On a CPU, 4 MB and the tensors made from them stay in the cache: 22016 x 4096 weights of a
# layer take 0.2 s, but 0.6 s in one go (one core, 32 MB of cache, 2026-11-25). A GPU takes more, to save launches.
_WEIGHTS = {"cpu": 2**20, "cuda": 2**25}


def strips(W: Tensor) -> list[slice]:
    """Return slices that cut the rows of W into strips, each of about as many weights as suit the device."""
    size = max(1, _WEIGHTS.get(W.device.type, _WEIGHTS["cpu"]) // max(1, W[:1].numel()))
    return [slice(start, start + size) for start in range(0, len(W), size)]


def computable(W: Tensor) -> Tensor:
    """Return W in float32 if it is stored in fewer bits, else W itself."""
    return W.to(torch.promote_types(W.dtype, torch.float32))


def mean(terms: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Return the mean of the terms, summed in float64 in pieces that one thread adds up."""
    return _total(piece.sum(dtype=torch.float64) for piece in terms.split(_ROWS)) / len(terms)


def lost_energy(problem: Problem, solution: Solution, H: Tensor | None) -> Float[Tensor, ""]:
    """Return the loss of a solution, tr(ΔW H ΔWᵀ). H None means the identity."""
    size, starts = problem.grid.group_size, range(0, len(problem.W), _ROWS)
    strips = ((problem.W[at : at + _ROWS], solution.rows(at, at + _ROWS)) for at in starts)
    return _total(energy(W - rounded.dequantize(size), H) for W, rounded in strips)


def energy(W: Tensor, H: Tensor | None) -> Float[Tensor, ""]:
    """Return tr(W H Wᵀ), the mean squared output of a layer with these weights. H None means the identity."""
    return _total(inner(w, w if H is None else w @ H) for w in map(computable, W.split(_ROWS)))


def inner(A: Float[Tensor, "rows in"], B: Float[Tensor, "rows in"]) -> Float[Tensor, ""]:
    """Return ⟨A, B⟩, summed within each row first: a direct sum to one number depends on the number of threads."""
    return _total((A[rows] * B[rows]).sum(-1, dtype=torch.float64).sum() for rows in strips(A))


def _total(terms: Iterable[Tensor]) -> Tensor:
    """Add numbers one after the other. They stay where they are: a GPU is not waited for."""
    return sum(terms, torch.zeros((), dtype=torch.float64))
