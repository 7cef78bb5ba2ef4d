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

import torch
from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.problem import Problem, damped, energy

_DAMPINGS = (0.01, 0.05, 0.25)
_ROWS = 256  # of W, spread evenly, that choose λ and α (SmolLM2-135M, 4 bit: KL 0.0802; 0.0801 with all; 2026-11-23)


@dataclass(frozen=True)
class Match:
    """The weights to round, and how they were found."""

    W: Float[Tensor, "out in"]
    step: float
    """α: 0 keeps the original weights."""


def match(problem: Problem) -> Match:
    """The weights of the problem moved towards the original model's outputs; itself where nothing is known of those."""
    stats, W = problem.statistics, problem.W
    if stats is None or stats.lack is None or stats.lack_val is None:
        return Match(W, 0.0)
    rows = slice(None, None, max(1, len(W) // _ROWS))
    best, best_step, best_gain = None, 0.0, 0.0
    for damping in _DAMPINGS:
        L, failed = torch.linalg.cholesky_ex(damped(stats.H, damping))
        if bool(failed):
            continue
        P = torch.cholesky_solve(stats.lack[rows].T, L).T
        # |T - X αPᵀ|² = |T|² - 2α⟨P, TᵀX⟩ + α²⟨P H, P⟩ on held-out tokens
        along = float((P * stats.lack_val[rows]).sum(dtype=torch.float64))
        across = energy(P, stats.H_val)
        step = min(1.0, max(0.0, along / across)) if across > 0 else 0.0
        gain = 2 * step * along - step**2 * across
        if gain > best_gain:
            best, best_step, best_gain = L, step, gain
    return Match(W if best is None else W + best_step * torch.cholesky_solve(stats.lack.T, best).T, best_step)
