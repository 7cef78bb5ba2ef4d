"""Moments of an expert that saw few tokens, shrunk towards those of all experts of its layer.

H_e of n_e tokens is a noisy estimate, and GPTQ needs its inverse, where noise counts most. The layer's H has little
noise, but it is another expert's as much as e's. So an expert gets

    H = (1 - λ_e) H_e + λ_e H_layer,     λ_e = ν / (ν + n_e)

as if it had seen ν more tokens, of the layer: the posterior mean under an inverse Wishart prior (Haff 1980,
doi 10.1214/aos/1176345010). What deviates: ν is not estimated from the moments, but chosen by the loss that GPTQ is to
be expected to have on held-out tokens. With H⁻¹ = Uᵀ U, GPTQ leaves ΔW = Σ_i e_i U_i / U_ii with rounding errors e_i
that are independent and about equally large. With held-out moments V_e that is, in closed form, without any rounding,

    E tr(ΔW V_e ΔWᵀ)  ∝  Σ_i  U_i V_e U_iᵀ / U_ii²

Measured on a mixture made of SmolLM2-135M (8 experts, 16x512 tokens of WikiText-2, block 3, widths 576 and 1536): this
sum and the real held-out loss, relative to those at ν = width:

    tokens                 ν = 0    width/2   width    2 width   4 width    ∞
    773, gate and up       1.211    1.027     1        0.990     0.994    1.051    expected
                           1.207    1.028     1        0.994     0.995    1.046    real
    1162, down             1.184    1.009     1        1.001     1.008    1.039    expected
                           1.170    0.975     1        0.976     1.013    1.028    real

(2-core AVX2 machine, 2026-11-28.) One ν serves all experts of a layer: it is chosen on a few of them.

An expert that saw nothing has λ = 1. The target moment shrinks with 1 - λ_e, as in a ridge regression. Of the held-out
moments only those of very few tokens shrink: outputs are matched as far as the held-out tokens say something.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from llmq.algorithms.gptq import factorise, visiting_order
from llmq.algorithms.stable_sums import energy
from llmq.calibration.input_statistics import InputStatistics
from llmq.calibration.layer_moments import LayerMoments

STRENGTHS = (0.5, 2.0, 8.0)  # of ν, in multiples of the width
USUAL = 2.0  # the best one in all layers that were looked at; the choice if nothing is held out
JUDGES = 3  # experts that ν is chosen on
# Held-out tokens without an error to correct that each expert is taken to have had besides its own.
_MORE_HELD_OUT = 32


@dataclass(frozen=True)
class Judge:
    """An expert that ν is chosen on."""

    tokens: int
    held_out: int
    H: Float[Tensor, "in in"]
    H_val: Float[Tensor, "in in"]


def judges_among(tokens: list[int], held_out: list[int]) -> list[int]:
    """Return the numbers of the experts to choose on: evenly spread by tokens, among those with held-out ones."""
    known = sorted((n, expert) for expert, n in enumerate(tokens) if n and held_out[expert])
    at = [len(known) * (2 * i + 1) // (2 * JUDGES) for i in range(JUDGES)]
    return [known[i][1] for i in dict.fromkeys(at)] if known else []


def chosen_strength(judges: list[Judge], layer: LayerMoments, damping: float) -> float:
    """Return ν in multiples of the width: the one of least expected loss over the held-out tokens of the judges."""
    if not judges:
        return USUAL
    width = len(layer.H)
    losses = {
        strength: sum(
            judge.held_out
            * expected_loss(
                mixed(judge.H, layer.H, share_of_layer(judge.tokens, width, strength)), judge.H_val, damping
            )
            for judge in judges
        )
        for strength in STRENGTHS
    }
    return min(STRENGTHS, key=lambda strength: losses[strength])


def expected_loss(H: Float[Tensor, "n n"], V: Float[Tensor, "n n"], damping: float) -> float:
    """Return Σ_i U_i V U_iᵀ / U_ii²: GPTQ's loss under V if it is given H, but for a factor."""
    diagonal = H.diagonal().where(H.diagonal() > 0, 1.0)
    order = visiting_order("static", diagonal, len(H))
    U, _, _ = factorise(H, diagonal, order, damping)
    return float(energy(U / U.diagonal()[:, None], V.index_select(0, order).index_select(1, order)))


def share_of_layer(tokens: int, width: int, strength: float) -> float:
    """Return λ."""
    return strength * width / (strength * width + tokens)


def mixed(own: Float[Tensor, "n n"], layer: Float[Tensor, "n n"], share: float) -> Float[Tensor, "n n"]:
    """Return (1 - share) own + share layer."""
    return torch.lerp(own, layer, share)


def shrunk(own: InputStatistics, layer: LayerMoments, held_out: int, strength: float) -> InputStatistics:
    """Return the statistics of an expert, with the help of the layer's. `held_out`: the expert's held-out tokens."""
    share = share_of_layer(own.tokens, len(own.H), strength)
    share_val = _MORE_HELD_OUT / (_MORE_HELD_OUT + held_out)
    H_val = mixed(own.H_val, layer.H_val, share_val) if held_out else layer.H_val
    moment, moment_val = own.target_moment, own.target_moment_val
    return replace(
        own,
        H=mixed(own.H, layer.H, share),
        H_val=H_val,
        target_moment=None if moment is None else moment.mul_(1 - share),
        target_moment_val=None if moment_val is None else moment_val.mul_(1 - share_val),
        borrowed=share,
    )
