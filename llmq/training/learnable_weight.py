"""A quantized weight that can learn: codes and scales are real numbers, and the weight uses them rounded.

    Ŵ = S · (round(V) - z),    S = s · f rounded as stored,    V in code units, f a factor on each scale

The gradient treats both roundings as the identity (straight through). It is 0 for a V outside of the codes.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.core import grid
from llmq.core.quantized_weight import QuantizedWeight

_INSIDE = 0.45  # the largest distance of V from its code at the start: V then rounds to the given code


class Latent(nn.Module):
    """A weight that learns: V [out, groups, size] in code units, and a factor on each scale.

    `hint`: the weights before rounding. They set where V starts within its cell: near the edge, the next code is
    almost as good.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: QuantizedWeight, hint: Float[Tensor, "out in"]) -> None:
        super().__init__()
        self.bits, self.dtype = weight.bits, weight.scale.dtype
        self.register_buffer("scale", weight.scale[..., None].float())
        self.register_buffer("zero", weight.zero[..., None].float())
        q = grid.group_view(weight.q, weight.group_size).float()
        inside = grid.group_view(hint, weight.group_size).float() / self.scale + self.zero
        self.V = nn.Parameter(torch.maximum(torch.minimum(inside, q + _INSIDE), q - _INSIDE), requires_grad=False)
        self.factor = nn.Parameter(torch.ones_like(self.scale), requires_grad=False)

    def forward(self) -> Float[Tensor, "out in"]:
        """Return Ŵ, with gradients."""
        exact = self.scale * self.factor
        stored = exact + (grid.storable(exact, self.dtype).float() - exact).detach()  # this difference is exact
        W: Any = _Dequantized.apply(self.V, stored, self.zero, 2**self.bits - 1)
        return W.flatten(-2)

    @torch.no_grad()
    def rounded(self) -> QuantizedWeight:
        """Return the codes and scales as they would be stored now."""
        q = self.V.round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        scale = grid.storable((self.scale * self.factor)[..., 0], self.dtype)
        return QuantizedWeight(q, scale, self.zero[..., 0].to(torch.uint8), self.bits)


class _Dequantized(torch.autograd.Function):
    """scale · (nearest code - zero). The backward pass needs only V, scale and zero: no copy is kept."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, scale: Tensor, zero: Tensor, highest: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(V, scale, zero)
        ctx.highest = highest
        return V.round().clamp_(0, highest).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        V, scale, zero = ctx.saved_tensors
        codes = V.round().clamp_(0, ctx.highest).sub_(zero)
        along = codes.mul_(gradient).sum(-1, keepdim=True)
        if not ctx.needs_input_grad[0]:
            return None, along, None, None
        # V learns up to half a code outside of the codes. Further out it could only run away.
        inside = (V - ctx.highest / 2).abs_() < (ctx.highest + 1) / 2
        return gradient.mul(scale).mul_(inside), along, None, None
