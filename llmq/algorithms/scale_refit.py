"""New scales for finished codes.

Objective, as in GPTQ, over the scales s of a row with its codes fixed:

    (w - ŵ) H (w - ŵ)ᵀ,    ŵ_g = s_g (q_g - z_g) for each group g

GPTQ chooses a group's scale before it knows the group's codes and the errors of later groups. Once all codes are known,
the objective is quadratic in the scales. Each group in turn gets its best scale while all other scales stay fixed:

    s_g  <-  s_g + c_g (E H)_gᵀ / c_g H_gg c_gᵀ,          c_g = q_g - z_g,  E = w - ŵ

(Gauss-Seidel on the normal equations.) The result is rounded to the nearest scale that can be stored. The old scale can
be stored too and is no nearer, so the objective never gets worse.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.problem import Problem, Solution
from llmq.core import grid

_SWEEPS = 2


def refit_scales(problem: Problem, solution: Solution, H: Float[Tensor, "in in"]) -> Solution:
    """Return the solution with better scales. Codes and zeros stay. H is damped and positive definite."""
    size = problem.grid.group_size
    codes = grid.group_view(solution.q, size).to(H.dtype) - solution.zero[..., None].to(H.dtype)
    scale = solution.scale.clone()
    G = (problem.W - solution.dequantize(size)).to(H.dtype) @ H
    for g in [*range(scale.shape[1])] * _SWEEPS:
        columns, c = slice(g * size, (g + 1) * size), codes[:, g]
        along = (c * G[:, columns]).sum(1)
        across = ((c @ H[columns, columns]) * c).sum(1)
        now = scale[:, g].to(H.dtype)
        # A group whose codes all equal the zero point keeps its scale: any scale gives zeros.
        fitted = grid.storable(now + along / across.where(across > 0, 1), scale.dtype)
        G.addmm_((fitted.to(H.dtype) - now)[:, None] * c, H[columns], alpha=-1)
        scale[:, g] = fitted
    return replace(solution, scale=scale)
