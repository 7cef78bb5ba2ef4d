"""Coordinate descent on finished codes (QuantEase, Behdin et al., arXiv 2309.01885; CDQuant, arXiv 2406.17542).

Objective, as in GPTQ:    (w - ŵ) H (w - ŵ)ᵀ    with the same damped H

GPTQ rounds each column once, before it knows the codes of later columns. A pass visits all columns again. It gives each
the best code while all other columns stay fixed, so the objective never gets worse:

    ŵ_i  <-  nearest point of the grid to  ŵ_i + G_i / H_ii,          G = (W - Ŵ) H

G is updated as GPTQ updates its weights: by rank-1 updates inside a block of columns, by one matmul outside.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.problem import Problem, Solution
from llmq.core import grid

_BLOCK = 128


def descend(problem: Problem, solution: Solution, H: Float[Tensor, "in in"], passes: int) -> Solution:
    """Return the solution after some passes over its columns. Scales and zeros stay. H has a positive diagonal."""
    size, bits = problem.grid.group_size, problem.grid.bits
    # Transposed, because the loops below read whole columns of W, which are contiguous rows of Wᵀ.
    W_hat = solution.dequantize(size).to(H.dtype).T.contiguous()
    Q = solution.q.T.contiguous()
    G = H @ (problem.W.T - W_hat)
    for start in [*range(0, len(H), _BLOCK)] * passes:
        block = slice(start, min(start + _BLOCK, len(H)))
        Hb, Gb, before = H[block, block], G[block].clone(), W_hat[block].clone()
        for i, column in enumerate(range(block.start, block.stop)):
            scale, zero = solution.scale[:, column // size], solution.zero[:, column // size]
            Q[column] = grid.quantize(W_hat[column] + Gb[i] / Hb[i, i], scale, zero, bits)
            w = grid.dequantize(Q[column], scale, zero, H.dtype)
            Gb.addr_(Hb[:, i], w - W_hat[column], alpha=-1)
            W_hat[column] = w
        G.addmm_(H[:, block], W_hat[block] - before, alpha=-1)
    return replace(solution, q=Q.T.contiguous())
