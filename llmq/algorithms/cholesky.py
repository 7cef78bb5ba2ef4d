"""Cholesky's factorisation in the memory of the matrix, with the same bits for any number of threads.

    A = L Lᵀ      for each block k on the diagonal:
    .────.
    │L_kk│            L_kk  =  chol(A_kk)                  LAPACK
    │────┼────.       L_ik  =  A_ik L_kk⁻ᵀ                 i > k
    │L_ik│A_ij│       A_ij -=  L_ik L_jkᵀ                  i ≥ j > k
    '────┴────'

LAPACK orders its sums by the number of threads: at n = 1536 its factor has other bits on two threads than on one. Here
it gets only small blocks and one thread. The rest is matrix products with a block as the inner side. They add up in one
order if all sides are multiples of 16 (torch 2.13 with MKL, 1 to 64 threads). The inputs of packable linears are.
Otherwise a thread sums its last few rows in another way. Long inner sides in float64 have the same problem.

A GPU gets the whole matrix in one call: that is what its library is fast at, and its bits need not be a CPU's. Nothing
is read there, so that it does not wait: a matrix without a factor gives NaN.

Factor and inverse take 0.8 of LAPACK's time at n = 576, half of it at 1536 and 4096 (one AVX-512 core, 2026-11-25).
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 128  # 256 is a tenth slower at n = 1536, because LAPACK does more of the work on its one thread
_STRIP = 512  # rows updated at once; their values above the diagonal are wasted work


@dataclass(frozen=True)
class Factor:
    """L of A = L Lᵀ, with zeros above the diagonal."""

    L: Float[Tensor, "n n"]
    inverses: list[Tensor]  # L_kk⁻¹ of each block on the diagonal; empty on a GPU

    @property
    def is_whole(self) -> bool:
        """Tell whether the matrix was factorised in one call, on a GPU."""
        return not self.inverses

    def invert_(self) -> Float[Tensor, "n n"]:
        """Overwrite L with V = L⁻¹ and return it: V_kk = L_kk⁻¹ and V_k = -V_kk Σ_j<k L_kj V_j, summed where L was."""
        V = self.L
        if self.is_whole:
            identity = torch.eye(len(V), dtype=V.dtype, device=V.device)
            return V.copy_(torch.linalg.solve_triangular(V, identity, upper=False))
        for k, V_kk in self._blocks():
            V[k, : k.start].copy_(-V_kk @ V[k, : k.start])
            V[k, k] = V_kk
            below = V[k.stop :, k]
            V[k.stop :, : k.start].addmm_(below, V[k, : k.start])
            below.copy_(below @ V_kk)
        return V

    def solve_(self, B: Float[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
        """Overwrite B with the X of X A = B and return it: Y Lᵀ = B from left to right, then X L = Y back."""
        if self.is_whole:
            return B.copy_(torch.cholesky_solve(B.T, self.L).T)
        for k, V_kk in self._blocks():
            B[:, k] = B[:, k] @ V_kk.T
            B[:, k.stop :].addmm_(B[:, k], self.L[k.stop :, k].T, alpha=-1)
        for k, V_kk in reversed(self._blocks()):
            B[:, k] = B[:, k] @ V_kk
            B[:, : k.start].addmm_(B[:, k], self.L[k, : k.start], alpha=-1)
        return B

    def _blocks(self) -> list[tuple[slice, Tensor]]:
        return list(zip(_slices(0, len(self.L), _BLOCK), self.inverses, strict=True))


def cholesky_(A: Float[Tensor, "n n"]) -> Factor | None:
    """Overwrite a symmetric A with its factor and return it. Only the lower triangle of A is read.

    Return None if A is not positive definite within rounding, or not finite. A is overwritten in this case too. On a
    GPU return a factor of NaN instead.
    """
    if A.device.type != "cpu":
        L, failed = torch.linalg.cholesky_ex(A)
        return Factor(A.copy_(L.masked_fill_(failed != 0, torch.nan)), [])
    inverses: list[Tensor] = []
    for k in _slices(0, len(A), _BLOCK):
        with _one_thread(A.device):
            L_kk, failed = torch.linalg.cholesky_ex(A[k, k])
            if bool(failed) or not bool(torch.isfinite(L_kk.diagonal()).all()):
                return None
            identity = torch.eye(len(L_kk), dtype=A.dtype, device=A.device)
            inverses.append(torch.linalg.solve_triangular(L_kk, identity, upper=False))
        A[k, k] = L_kk
        A[k, k.stop :] = 0
        below = A[k.stop :, k]
        below.copy_(below @ inverses[-1].T)
        for i in _slices(k.stop, len(A), _STRIP):
            A[i, k.stop : i.stop].addmm_(A[i, k], A[k.stop : i.stop, k].T, alpha=-1)
    return Factor(A, inverses)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


@contextmanager
def _one_thread(device: torch.device) -> Generator[None]:
    """Use one thread on a CPU: from 96 columns on, LAPACK gives other bits with some other numbers of threads."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
