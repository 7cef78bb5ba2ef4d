"""Activations as an engine with 8-bit matmuls sees them: rounded to integers, and back.

    dynamic    Q(x) = s · round(x / s)                    s = max|x| / 127 of each token
    static     Q(x) = s · clamp(round(x / s), -128, 127)  s is stored

vLLM computes the same scales and codes (its int8 kernels, 2026). The gradient passes the rounding as if it was the
identity (straight through: Bengio et al., arXiv 1308.3432). Where a stored scale cuts x off, it is 0; the scale has
the gradient of LSQ (Learned Step Size Quantization, arXiv 1902.08153), without its factor, which Adam makes up for.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_MOST = 127  # the largest code; with a scale for each token, -128 is not used


def per_token(x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
    """Return x with each token rounded to 255 steps over its range, in the dtype of x."""
    exact = x.detach().float()
    scale = (exact.abs().amax(-1, keepdim=True) / _MOST).clamp(min=torch.finfo(torch.float32).tiny)  # zeros stay zeros
    rounded = (exact / scale).round_().mul_(scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


def per_tensor(x: Float[Tensor, "*batch in"], scale: Float[Tensor, "1"]) -> Float[Tensor, "*batch in"]:
    """Return x rounded to 256 steps of one scale, float32, in the dtype of x. Both may have a gradient."""
    y: Any = _PerTensor.apply(x, scale)
    return y


class _PerTensor(torch.autograd.Function):
    """s · clamp(round(x / s)). The backward pass needs only x and s: no copy is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, scale)
        return (x.float() / scale).round_().clamp_(-_MOST - 1, _MOST).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale = ctx.saved_tensors
        steps = x.float() / scale
        codes = steps.round().clamp_(-_MOST - 1, _MOST)
        inside = (steps >= -_MOST - 1) & (steps <= _MOST)
        along = torch.where(inside, codes - steps, codes)
        return gradient * inside, (gradient.float() * along).sum().reshape(1)
