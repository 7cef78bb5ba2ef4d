"""Output matching: move the weights before rounding, so that a layer makes up for the errors of the blocks before it.

GPTQ reproduces W X on the quantized model's inputs X, so the errors of earlier blocks add up. The layer should give
W X_o, with the inputs X_o of the original model. These weights W* come closest to that, before any rounding:

    minimise |ΔR + X_o Wᵀ - X W*ᵀ|²:     W* = W + TᵀX (H + λI)⁻¹,     T = ΔR + (X_o - X) Wᵀ,   H = XᵀX

(GPTAQ, Li et al., arXiv 2504.02692; Qronos, Zhang et al., arXiv 2505.11695.) What deviates from both, and why:

  * Some layers add their output to the residual stream. Such a layer also makes up for ΔR, the error that the stream
    has already, because the next block reads the sum (LoaQ, arXiv 2509.06297).
  * The weights move only a fraction α of the way: W + α (W* - W). α, and λ out of three, bring the output on held-out
    tokens closest to the original's. TᵀX and H of these tokens give α in closed form. α = 1 fits the noise of the
    calibration text, which may explain reports of no gain.
  * The correction comes before rounding and is the same for every method. It is not part of GPTQ's loop.
"""

from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.cholesky import Factor, cholesky_
from llmq.algorithms.problem import Problem, damped, spread
from llmq.algorithms.stable_sums import energy, inner
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.device import numbers
from llmq.core.distributed import ALONE, Ranks

_DAMPINGS = (0.01, 0.05, 0.25)
_ROWS = 1024  # rows solved for at once


@dataclass(frozen=True)
class Match:
    """How far to move the weights, and with which damping."""

    damping: float  # λ, as a fraction of mean(diag H)
    alpha: float  # α, 0 to 1: the fraction of the way. 0 keeps the original weights.
    factor: Factor | None = field(default=None, repr=False, compare=False)  # of H + λI, if it was kept


def choose(problem: Problem, ranks: Ranks = ALONE) -> Match:
    """Return the match that brings the held-out outputs closest to the original model's.

    About 256 rows choose for all (SmolLM2-135M, 4 bit: KL 0.0802; with all rows 0.0801; 2026-11-23). Each process tries
    some of the λ.
    """
    none = Match(_DAMPINGS[0], 0.0)
    stats = problem.statistics
    if stats is None or stats.target_moment is None or stats.target_moment_val is None:
        return none
    rows, mine = spread(len(problem.W)), _DAMPINGS[ranks.rank :: ranks.size]
    moments = stats.target_moment[rows], stats.target_moment_val[rows]
    factors, terms = dict[float, Factor | None](), list[float | Tensor]()
    for damping in mine:
        factor, *both = _tried(stats, *moments, damping)
        terms += both
        # Three matrices of H's size are too much memory for a CPU, where it takes a fifth of all factorisations.
        factors[damping] = factor if factor is not None and factor.is_whole else None
        del factor
    read = numbers(terms)
    gains = [_gain(*each) for each in zip(read[::2], read[1::2], mine, strict=True)]
    every = [(0.0, none), *(gain for of_process in ranks.each(gains) for gain in of_process)]
    best = max(every, key=lambda gain: (gain[0], -gain[1].damping))[1]
    return replace(best, factor=factors.get(best.damping))


def _tried(
    stats: InputStatistics, moment: Tensor, moment_val: Tensor, damping: float
) -> tuple[Factor | None, float | Tensor, float | Tensor]:
    """Return the factor of H with this damping, and ⟨P, TᵀX⟩ and ⟨P H, P⟩ on held-out tokens, of some rows."""
    factor = cholesky_(damped(stats.H, damping))
    if factor is None:
        return None, 0.0, 0.0
    P = factor.solve_(moment.clone())
    return factor, inner(P, moment_val), energy(P, stats.H_val)


def _gain(along: float, across: float, damping: float) -> tuple[float, Match]:
    """Return the gain on held-out tokens with this damping and its best α, and the match of both.

    |T - X αPᵀ|² = |T|² - 2α⟨P, TᵀX⟩ + α²⟨P H, P⟩. Without a factor of H these are 0 or NaN, and there is no gain.
    """
    alpha = min(1.0, max(0.0, along / across)) if across > 0 else 0.0
    return (2 * alpha * along - alpha**2 * across if alpha else 0.0), Match(damping, alpha)


def matched(problem: Problem, match: Match) -> Float[Tensor, "out in"]:
    """Return the problem's weights, moved towards the original model's outputs. The problem may hold only some rows."""
    stats, W = problem.statistics, problem.W
    if stats is None or stats.target_moment is None or match.alpha == 0:
        return W
    factor = match.factor or cholesky_(damped(stats.H, match.damping))
    assert factor is not None, "H had a factor when the damping was chosen"
    moved = W.clone()
    for rows in (slice(start, start + _ROWS) for start in range(0, len(W), _ROWS)):
        moved[rows].add_(factor.solve_(stats.target_moment[rows].clone()), alpha=match.alpha)
    return moved
