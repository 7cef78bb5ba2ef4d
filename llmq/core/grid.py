"""THE rounding convention: w ~= scale * (q - zero), with q an integer code in [0, 2**bits).

The field has six dialects of this grid; llmq computes in this one and converts at the edges.
A group of weights is a row of `group_size` consecutive inputs, so every function here works on `[..., group_size]` and
gives one (scale, zero) per leading index.

Symmetric: zero = 2**(bits-1), and the scale carries a sign chosen so that the weight of largest magnitude lands exactly
on code 0, the one code without a mirror image. Compared with the usual max/7.5 the step shrinks by 1/16 at 4 bit and by
a quarter at 2 bit, for free: the same file, the same kernels.

       max/7.5         -7.5 ....... 0 ....... 7.5      code 15 = +7: the largest weight is clipped
       full range      -8 ......... 0 ......... 7      scale < 0 when the largest weight is positive

One group of four weights at 4 bit. The largest, 0.8, gets code 0, and 0.24 is rounded to 0.2:

    >>> W = torch.tensor([[0.8, -0.5, 0.24, 0.1]])                     # [groups, group_size] = [1, 4]
    >>> scale, zero = choose_scale_zero(W, 4, True, torch.float32)     # [groups] each
    >>> scale, zero
    (tensor([-0.1000]), tensor([8], dtype=torch.uint8))
    >>> q = quantize(W, scale[:, None], zero[:, None], 4)              # [groups, group_size]
    >>> q
    tensor([[ 0, 13,  6,  7]], dtype=torch.uint8)
    >>> dequantize(q, scale[:, None], zero[:, None], torch.float32)    # [groups, group_size]
    tensor([[ 0.8000, -0.5000,  0.2000,  0.1000]])
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

_WIDTHS = tuple(1 - 0.6 * i / 7 for i in range(1, 8))
_LEAST_SQUARES = 3


def choose_scale_zero(
    W: Float[Tensor, "*groups group_size"],
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    shrink: Float[Tensor, "*#groups"] | float = 1.0,
) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]:
    """Return the grid that spans the range of each group, or the fraction `shrink` of it (clips the largest weights).

    The scale is never zero, and negative in half of the symmetric groups. It is already rounded to `dtype`, in which
    it is stored: codes must be rounded against this value. The zero point is in code units.
    """
    return _spanning(_range(W, symmetric), bits, symmetric, dtype, shrink)


def _range(W: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the two ends of each group's grid: least and greatest weight; if symmetric, the largest and 0."""
    # The range must contain 0, or the zero point would not be a code.
    low, high = W.amin(-1).clamp(max=0), W.amax(-1).clamp(min=0)
    if not symmetric:
        return low, high
    largest = torch.where(high > -low, high, low)
    # Of two that are as large the first one counts. On a CPU torch's argmax is slow: it is asked in these cases only.
    # To ask a GPU whether there are any would be to wait for it.
    tied = high == -low
    if W.device.type != "cpu":
        first = W.gather(-1, W.abs().argmax(-1, keepdim=True)).squeeze(-1)
        largest = torch.where(tied, first, largest)
    elif bool(tied.any()):
        few = W[tied]
        largest[tied] = few.gather(-1, few.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return largest.clamp(max=0), largest.clamp(min=0)


def _spanning(
    ends: tuple[Tensor, Tensor], bits: int, symmetric: bool, dtype: torch.dtype, shrink: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return scale and zero of the grids that cover the fraction `shrink` of these ranges."""
    low, high = ends[0] * shrink, ends[1] * shrink
    if symmetric:
        half = 2 ** (bits - 1)
        scale = storable(-(low + high) / half, dtype)
        return scale, torch.full(scale.shape, half, dtype=torch.uint8, device=scale.device)
    scale = storable((high - low) / (2**bits - 1), dtype)
    zero = (-low / scale.to(low.dtype)).round().clamp(0, 2**bits - 1)
    return scale, zero.to(torch.uint8)


def common_scale_zero(
    W: Float[Tensor, "*groups group_size"], bits: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]:
    """Return the symmetric grid of other tools: a scale of max/7.5 at 4 bit."""
    scale = storable(W.abs().amax(-1) * (2 / (2**bits - 1)), dtype)
    return scale, torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8, device=W.device)


def search_scale_zero(
    W: Float[Tensor, "*groups group_size"],
    importance: Float[Tensor, "*#groups group_size"],
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    power: float = 2.0,
) -> tuple[Float[Tensor, "*groups"], UInt8[Tensor, "*groups"]]:
    """Return the grid of each group with the least Σ_k importance_k |w_k - ŵ_k|^power of those tried.

    It is never worse than the grid of the whole range. Eight widths are tried, from the whole range down to 0.4 of it
    (2-bit grids are best far inside it, wider ones stop near 0.8); for asymmetric 2 and 3 bit the neighbouring zero
    points too. Least squares then improve the best grid three times: the scale that suits the codes, then codes that
    suit the scale. Three such steps after eight widths find better grids than 32 widths do.
    """
    better = judge(W, importance, bits, power)
    ends = _range(W, symmetric)
    whole = _spanning(ends, bits, symmetric, dtype, 1.0)
    best = better(None, *whole)
    for width in _WIDTHS:
        best = better(best, *_spanning(ends, bits, symmetric, dtype, width))
    for shift in (-1, 1) if not symmetric and bits <= 3 else ():
        zero = (best[2].to(torch.int16) + shift).clamp(0, 2**bits - 1).to(torch.uint8)
        best = better(best, best[1], zero)
    for _ in range(_LEAST_SQUARES):
        _, scale, zero = best
        steps = steps_of(W, scale[..., None], zero[..., None], bits)
        weighted = steps * importance
        fitted = (W * weighted).sum(-1) / (steps * weighted).sum(-1)
        best = better(best, storable(fitted, dtype), zero)  # 0/0 is not better
    return best[1], best[2]


Best = tuple[Tensor, ...]
"""The error of each group's best grid so far, its scale and its zero point."""


def judge(W: Tensor, importance: Tensor, bits: int, power: float) -> Callable[[Best | None, Tensor, Tensor], Best]:
    """Return a function that takes the best grids so far and others, and returns the better one of each group."""

    def better(best: Best | None, scale: Tensor, zero: Tensor) -> Best:
        E = steps_of(W, scale[..., None], zero[..., None], bits).mul_(scale[..., None].to(W.dtype)).sub_(W)
        error = (E.square_() if power == 2 else E.abs_().pow_(power)).mul_(importance).sum(-1)
        found = error, scale, zero
        if best is None:
            return found
        return tuple(torch.where(error < best[0], new, old) for new, old in zip(found, best, strict=True))

    return better


def storable(step: Float[Tensor, "*groups"], dtype: torch.dtype) -> Float[Tensor, "*groups"]:
    """Round to the storage dtype, keeping clear of 0 (an all-zero group) and of overflow.

    The floor is a subnormal with 5 significant bits left: codes are rounded against the stored value, so a coarse
    scale costs nothing, but raising it to the smallest normal would coarsen 8-bit grids of small float16 weights.
    """
    limits = torch.finfo(dtype)
    magnitude = step.abs().clamp(limits.tiny / 32, limits.max)
    return torch.where(step < 0, -magnitude, magnitude).to(dtype)


def stored_scale(exact: Float[Tensor, "*groups"], dtype: torch.dtype) -> Float[Tensor, "*groups"]:
    """Return float32 scales rounded as they would be stored. The gradient treats the rounding as the identity."""
    return exact + (storable(exact, dtype).float() - exact).detach()  # this difference is exact


def quantize(
    W: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*#shape"],
    zero: UInt8[Tensor, "*#shape"] | Float64[Tensor, "*#shape"],
    bits: int,
) -> UInt8[Tensor, "*shape"]:
    """Return the nearest code of every weight. `scale` and `zero` broadcast against `W`."""
    return _codes(W, scale, zero, bits).to(torch.uint8)


def _codes(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (W / scale.to(W.dtype)).add_(zero.to(W.dtype)).round_().clamp_(0, 2**bits - 1)


def steps_of(W: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return q - zero for the nearest codes q."""
    return _codes(W, scale, zero, bits).sub_(zero.to(W.dtype))


def dequantize(
    q: UInt8[Tensor, "*shape"],
    scale: Float[Tensor, "*#shape"],
    zero: UInt8[Tensor, "*#shape"] | Float64[Tensor, "*#shape"],
    dtype: torch.dtype,
) -> Float[Tensor, "*shape"]:
    """Return scale * (q - zero), computed in `dtype`."""
    return q.to(dtype).sub_(zero.to(dtype)).mul_(scale.to(dtype))


def group_view(W: Tensor, group_size: int) -> Tensor:
    """Return [out, in] as [out, groups, group_size]."""
    return W.unflatten(-1, (-1, group_size))
