"""Output matching: what a layer should compute on inputs that the blocks before it have already distorted.

GPTQ reproduces W X on the quantized model's inputs X, so the errors of earlier blocks pile up. What the layer should
give is W X_o, with the inputs X_o of the original model. Weights that come closest to that, before any rounding:

    minimise |ΔR + X_o Wᵀ - X W*ᵀ|²:     W* = W + TᵀX (H + λI)⁻¹,     T = ΔR + (X_o - X) Wᵀ,   H = XᵀX

(GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al., arXiv 2505.11695.) What deviates from both, and why:

  * A layer whose output is added to the residual stream also makes up for what that stream lost before, ΔR (LoaQ, arXiv
    2509.06297): what counts is the sum.
  * The step is taken only as far as held-out tokens follow it: W + α (W* - W) with the α, and of a few λ the one, that
    bring the held-out output closest to the original's. Both come in closed form from TᵀX and H of the held-out tokens.
    A full step fits the noise of the calibration text, which is where reports of no gain seem to come from.
  * The correction comes before rounding and is the same for every method, not woven into GPTQ's loop.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.cholesky import cholesky_
from llmq.algorithms.problem import Problem, damped, energy, inner, spread
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.distributed import ALONE, Ranks

_DAMPINGS = (0.01, 0.05, 0.25)
_ROWS = 1024  # solved for at once


@dataclass(frozen=True)
class Match:
    """How the weights are to be moved."""

    damping: float
    """λ, as a fraction of mean(diag H)."""
    step: float
    """α: 0 keeps the original weights."""


def choose(problem: Problem, ranks: Ranks = ALONE) -> Match:
    """What brings the held-out outputs of the problem closest to the original model's.

    A few rows choose for all (SmolLM2-135M, 4 bit: KL 0.0802; 0.0801 when all of them did; 2026-11-23). Each process
    tries some of the λ.
    """
    none = Match(_DAMPINGS[0], 0.0)
    stats = problem.statistics
    if stats is None or stats.target_moment is None or stats.target_moment_val is None:
        return none
    rows = spread(len(problem.W))
    target_moment, target_moment_val = stats.target_moment[rows], stats.target_moment_val[rows]
    tried = ranks.each(
        [_tried(stats, target_moment, target_moment_val, damping) for damping in _DAMPINGS[ranks.rank :: ranks.size]]
    )
    found = [(0.0, none), *(each for those in tried for each in those)]
    return max(found, key=lambda each: (each[0], -each[1].damping))[1]


def _tried(
    stats: InputStatistics, target_moment: Tensor, target_moment_val: Tensor, damping: float
) -> tuple[float, Match]:
    """What some rows gain on held-out tokens with a damping and the best step, and these."""
    factor = cholesky_(damped(stats.H, damping))
    if factor is None:
        return 0.0, Match(damping, 0.0)
    P = factor.solve_(target_moment.clone())
    # |T - X αPᵀ|² = |T|² - 2α⟨P, TᵀX⟩ + α²⟨P H, P⟩ on held-out tokens
    along, across = inner(P, target_moment_val), energy(P, stats.H_val)
    step = min(1.0, max(0.0, along / across)) if across > 0 else 0.0
    return 2 * step * along - step**2 * across, Match(damping, step)


def matched(problem: Problem, match: Match) -> Float[Tensor, "out in"]:
    """The weights of the problem, of all rows or some, moved towards the original model's outputs."""
    stats, W = problem.statistics, problem.W
    if stats is None or stats.target_moment is None or match.step == 0:
        return W
    factor = cholesky_(damped(stats.H, match.damping))
    assert factor is not None, "it was there when the damping was chosen"
    moved = W.clone()
    for rows, target_moment in zip(moved.split(_ROWS), stats.target_moment.split(_ROWS), strict=True):
        rows.add_(factor.solve_(target_moment.clone()), alpha=match.step)
    return moved
