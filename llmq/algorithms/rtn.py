"""Round to nearest: the baseline every other method must beat.

Objective: |w - ŵ| for each weight, on the grid of its group that `--grid` asks for: `minmax` spans the group, `mse`
(the default) has the least Σ |w - ŵ|^2.4, `hessian` the least Σ H_kk (w_k - ŵ_k)², which alone needs calibration text.
"""

from llmq import grid
from llmq.algorithms.problem import Problem, Solution


def solve(problem: Problem) -> Solution:
    """Codes for the stacked rows of one group of linears."""
    W, stats = problem.groups(), problem.statistics
    importance = None if stats is None else stats.H.diagonal().view(W.shape[1:])
    scale, zero = problem.searched_grid(W, importance)
    return Solution(grid.quantize(W, scale[..., None], zero[..., None], problem.grid.bits).flatten(-2), scale, zero)
