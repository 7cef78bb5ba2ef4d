"""Activations as an engine with 8-bit matmuls would see them: rounded to integers, and back.

    Q(x) = s · clamp(round(x / s), -127, 127),    s = max|x| / 127 of each token (dynamic), or one number (static)

The rounding passes gradients on as they are, but none where a value was cut off. A static s learns by the rule of LSQ
(Esser et al., arXiv 1902.08153): d Q / d s is round(x/s) - x/s inside of the range, and ±127 outside of it.
vLLM and compressed-tensors 0.20.0 quantize in the same way: symmetric, dynamic per token or static per tensor.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOST = 127  # the largest code: -128 is not used, as in compressed-tensors' symmetric int8
_LEAST = 1e-5  # of a scale: a token of zeros


class ActivationQuantizer(nn.Module):
    """Rounds activations to 8 bits. Without `scale`, each token has a scale of its own."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.scale = None if scale is None else nn.Parameter(torch.tensor(float(scale)), requires_grad=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        if self.scale is None:
            return per_token(x)
        y: Any = _Static.apply(x, self.scale.clamp(min=_LEAST))
        return y


def per_token(x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
    """Return x with each token rounded to 255 steps over its range. Gradients pass as if nothing was rounded."""
    exact = x.detach().float()
    scale = (exact.abs().amax(-1, keepdim=True) / MOST).clamp(min=_LEAST)
    rounded = (exact / scale).round_().mul_(scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, scale)
        return (x.float() / scale).round_().clamp_(-MOST, MOST).mul_(scale).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale = ctx.saved_tensors
        steps = x.float() / scale
        inside = steps.abs() <= MOST
        of_scale = torch.where(inside, steps.round() - steps, steps.sign() * MOST) * gradient.float()
        return gradient * inside, of_scale.sum() / (x.numel() * MOST) ** 0.5
