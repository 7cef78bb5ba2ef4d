"""New scales for finished codes.

Objective, as in GPTQ, over the scales s of a row with its codes fixed:

    (w - ŵ) H (w - ŵ)ᵀ,    ŵ_g = s_g (q_g - z_g) for each group g

GPTQ chooses a group's scale before it knows the group's codes and the errors of later groups. Once all codes are known,
the objective is quadratic in the scales. Each group in turn gets its best scale while all other scales stay fixed:

    s_g  <-  s_g + c_g (E H)_gᵀ / c_g H_gg c_gᵀ,          c_g = q_g - z_g,  E = w - ŵ

(Gauss-Seidel on the normal equations.) The result is rounded to the nearest scale that can be stored. The old scale can
be stored too and is no nearer, so the objective never gets worse.

A real zero point follows its scale, as its bias is rounded, and then gets its own best value, with c_g = 1.
"""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.problem import Problem, Solution
from llmq.core import affine_grid, grid

_SWEEPS = 2


def refit_scales(problem: Problem, solution: Solution, H: Float[Tensor, "in in"]) -> Solution:
    """Return the solution with better scales. Codes and zeros that are codes stay. H is damped, positive definite."""
    size = problem.grid.group_size
    codes = grid.group_view(solution.q, size)
    scale, zero = solution.scale.clone(), solution.zero.clone()
    G = (problem.W - solution.dequantize(size)).to(H.dtype) @ H

    def put(g: int, new_scale: Tensor, new_zero: Tensor) -> None:
        before, after = (
            grid.dequantize(codes[:, g], s[:, None], z[:, None], H.dtype)
            for s, z in ((scale[:, g], zero[:, g]), (new_scale, new_zero))
        )
        G.addmm_(after - before, H[g * size : (g + 1) * size], alpha=-1)
        scale[:, g], zero[:, g] = new_scale, new_zero

    for g in [*range(scale.shape[1])] * _SWEEPS:
        columns = slice(g * size, (g + 1) * size)
        c = codes[:, g].to(H.dtype) - zero[:, g, None].to(H.dtype)
        along = (c * G[:, columns]).sum(1)
        across = ((c @ H[columns, columns]) * c).sum(1)
        # A group whose codes all equal the zero point keeps its scale: any scale gives zeros.
        fitted = grid.storable(scale[:, g].to(H.dtype) + along / across.where(across > 0, 1), scale.dtype)
        if not problem.grid.real_zeros:
            put(g, fitted, zero[:, g])
            continue
        put(g, fitted, affine_grid.storable_zero(fitted, zero[:, g]))
        shift = G[:, columns].sum(1) / H[columns, columns].sum()
        put(g, fitted, affine_grid.storable_zero(fitted, zero[:, g] - shift.double() / fitted.double()))
    return replace(solution, scale=scale, zero=zero)
