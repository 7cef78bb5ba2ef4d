"""A grid with real zero points: w ~= scale * q + bias, as MLX stores it.

llmq writes bias as -scale * zero, so that all code computes w ~= scale * (q - zero) as grid.py says. But zero need not
be a code: it is whatever the stored bias makes it, in float64, so that the same bias comes back. So no point of the
grid has to lie on 0, and all points can lie where the weights of the group are.

Mean squared error on normally distributed weights in groups of 64, as a fraction of their variance, on the grids that
the searches find with float16 scales (2026-11-30; test_affine_grid.py holds it to that):

    bits    zero in the middle    zero a code    real zero
    2             0.1262             0.1239        0.1025
    3             0.0312             0.0309        0.0271
    4             0.0082             0.0077        0.0067
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from llmq.core import grid

# What the search tries: fractions of the range, at places that differ by quarters of a step. Without the places, the
# errors above are 0.1059, 0.0284 and 0.0070. Twice as many of both gain less than 1 %.
_PLACES = (-0.375, -0.125, 0.125, 0.375)
_LEAST_SQUARES = 5


def storable_zero(scale: Float[Tensor, "*groups"], zero: Float[Tensor, "*groups"]) -> Float64[Tensor, "*groups"]:
    """Return the zero points nearest to these whose biases, -scale * zero, are numbers in the dtype of the scales."""
    exact = -(scale.double() * zero.double())
    most = torch.finfo(scale.dtype).max
    return zero_of(scale, exact.clamp(-most, most).to(scale.dtype))


def zero_of(scale: Float[Tensor, "*groups"], bias: Float[Tensor, "*groups"]) -> Float64[Tensor, "*groups"]:
    """Return the zero points of stored biases. No scale is 0."""
    return -bias.double() / scale.double()


def bias_of(scale: Float[Tensor, "*groups"], zero: Float64[Tensor, "*groups"]) -> Float[Tensor, "*groups"]:
    """Return the biases that `zero_of` made these zero points of."""
    return -(scale.double() * zero).to(scale.dtype)


def choose_scale_zero(
    W: Float[Tensor, "*groups group_size"],
    bits: int,
    dtype: torch.dtype,
    shrink: Float[Tensor, "*#groups"] | float = 1.0,
) -> tuple[Float[Tensor, "*groups"], Float64[Tensor, "*groups"]]:
    """Return the grid that spans each group from its least to its greatest weight, or `shrink` of that.

    It shrinks around its middle. The scale is above 0, and rounded to `dtype` as -scale * zero is.
    """
    low, high = W.amin(-1), W.amax(-1)
    return _spanning((low + high) / 2, (high - low) * shrink, bits, dtype)


def _spanning(middle: Tensor, width: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = grid.storable(width / (2**bits - 1), dtype)
    return scale, storable_zero(scale, (2**bits - 1) / 2 - middle.double() / scale.double())


def search_scale_zero(
    W: Float[Tensor, "*groups group_size"],
    importance: Float[Tensor, "*#groups group_size"],
    bits: int,
    dtype: torch.dtype,
    power: float = 2.0,
) -> tuple[Float[Tensor, "*groups"], Float64[Tensor, "*groups"]]:
    """Return the grid of each group with the least Σ_k importance_k |w_k - ŵ_k|^power of those tried.

    They are fractions of the group's range, moved by parts of a step; then scale and zero that fit the codes best by
    least squares, in turns.
    """
    better = grid.judge(W, importance, bits, power)
    low, high = W.amin(-1), W.amax(-1)
    middle, range_ = (low + high) / 2, high - low
    best = better(None, *_spanning(middle, range_, bits, dtype))
    for i in range(1, 7):  # grids of few points are best far inside of the range
        width = range_ * (1 - (0.1 if bits <= 3 else 0.05) * i)
        for place in _PLACES:
            best = better(best, *_spanning(middle + place * width / (2**bits - 1), width, bits, dtype))
    for _ in range(_LEAST_SQUARES):
        best = better(best, *_fitted(W, importance, best[1], best[2], bits))  # 0/0 is not better
    return best[1], best[2]


def _fitted(W: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return the scale and zero with the least Σ importance (w - scale (q - zero))² for the codes q of this grid."""
    steps = grid.steps_of(W, scale[..., None], zero[..., None], bits)
    total = importance.sum(-1)
    mean_step, mean_w = ((each * importance).sum(-1) / total for each in (steps, W))
    around = (steps - mean_step[..., None]) * importance
    fitted = grid.storable((around * W).sum(-1) / (around * steps).sum(-1), scale.dtype)
    return fitted, storable_zero(fitted, zero + mean_step.double() - mean_w.double() / fitted.double())
