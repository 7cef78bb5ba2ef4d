"""Trials around GPTQ. Each is kept for a group of linears only if it lowers the loss on held-out tokens.

    damping ─────► descent ─────► scale refit        judged by tr(ΔW H_val ΔWᵀ)
    one of three   if better      if better

Descent and refit always lower the objective on the calibration tokens, and damping always raises it. This proves
nothing: with few tokens, or at low bits, much of the gain on these tokens only fits their noise.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from llmq.algorithms import gptq
from llmq.algorithms.coordinate_descent import descend
from llmq.algorithms.problem import Problem, Solution, damped, spread
from llmq.algorithms.scale_refit import refit_scales
from llmq.algorithms.stable_sums import lost_energy
from llmq.core.settings import Gptq

_DAMPINGS = (1.0, 0.4, 3.0)  # multiples of the requested damping
_PASSES = 2

Trial = Callable[[Problem, Solution, Tensor], Solution]
_TRIALS: dict[str, Trial] = {
    "descent": lambda problem, solution, H: descend(problem, solution, H, _PASSES),
    "scale refit": refit_scales,
}


def solve(problem: Problem, settings: Gptq) -> Solution:
    """Return codes for the stacked rows of one group of linears, and in `kept` the names of the trials that helped.

    Raises WorkError as gptq.solve does.
    """
    assert problem.statistics is not None, "gptq needs input statistics"
    best = gptq.solve(problem, replace(settings, damping=_best_damping(problem, settings)))
    H, lost, kept = damped(problem.statistics.H, best.damping or 0.0), held_out_loss(problem, best), list[str]()
    for name, trial in _TRIALS.items():
        candidate = trial(problem, best, H)
        if (now := held_out_loss(problem, candidate)) < lost:
            best, lost = candidate, now
            kept.append(name)
    return replace(best, kept=kept)


def _best_damping(problem: Problem, settings: Gptq) -> float:
    """Return the damping with the least held-out loss on about 256 rows. Rows do not interact, so it suits all."""
    rows = spread(len(problem.W))
    few = replace(problem, W=problem.W[rows], clippable=problem.clippable[rows])
    dampings = (settings.damping * factor for factor in _DAMPINGS)
    tried = [replace(settings, damping=damping) for damping in dampings if damping < 1]
    return min(tried, key=lambda setting: held_out_loss(few, gptq.solve(few, setting))).damping


def held_out_loss(problem: Problem, solution: Solution) -> float:
    """Return the loss on held-out tokens, tr(ΔW H_val ΔWᵀ)."""
    assert problem.statistics is not None
    return float(lost_energy(problem, solution, problem.statistics.H_val))
