"""Output matching: what a layer should compute on inputs that the blocks before it have already distorted.

GPTQ reproduces W X on the quantized model's inputs X, so the errors of earlier blocks pile up. What the layer should
give is W X_o, with the inputs X_o of the original model. Weights that come closest to that, before any rounding:

    minimise |ΔR + X_o Wᵀ - X W*ᵀ|²:     W* = W + (W C + ΔRᵀX) (H + λI)⁻¹,     C = (X_o - X)ᵀX,   H = XᵀX

(GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al., arXiv 2505.11695.) What deviates from both, and why:

  * A layer whose output is added to the residual stream also makes up for what that stream lost before, ΔR (LoaQ, arXiv
    2509.06297): what counts is the sum.
  * The step is taken only as far as held-out tokens follow it: W + α (W* - W) with the α, and of a few λ the one, that
    bring the held-out output closest to the original's. Both come in closed form from C and H of the held-out tokens.
    A full step fits the noise of the calibration text, which is where reports of no gain seem to come from.
  * The correction comes before rounding and is the same for every method, not woven into GPTQ's loop.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.problem import Problem, damped, energy

_DAMPINGS = (0.01, 0.05, 0.25)


@dataclass(frozen=True)
class Match:
    """The weights to round, and how they were found."""

    W: Float[Tensor, "out in"]
    step: float
    """α: 0 keeps the original weights."""


def match(problem: Problem) -> Match:
    """The weights of the problem moved towards the original model's outputs; itself where nothing is known of those."""
    stats, W = problem.statistics, problem.W
    if stats is None or stats.C is None or stats.C_val is None:
        return Match(W, 0.0)
    wanted, wanted_val = W @ stats.C, W @ stats.C_val  # TᵀX of the output difference T that there is to make up for
    if stats.R is not None and stats.R_val is not None:
        wanted, wanted_val = wanted + stats.R, wanted_val + stats.R_val
    best, best_step, best_gain = torch.zeros_like(W), 0.0, 0.0
    for damping in _DAMPINGS:
        L, failed = torch.linalg.cholesky_ex(damped(stats.H, damping))
        if bool(failed):
            continue
        P = torch.cholesky_solve(wanted.T, L).T
        # |T - X αPᵀ|² = |T|² - 2α⟨P, TᵀX⟩ + α²⟨P H, P⟩ on held-out tokens
        along, across = float((P * wanted_val).sum(dtype=torch.float64)), energy(P, stats.H_val)
        step = min(1.0, max(0.0, along / across)) if across > 0 else 0.0
        gain = 2 * step * along - step**2 * across
        if gain > best_gain:
            best, best_step, best_gain = P, step, gain
    return Match(W + best_step * best, best_step)
