"""A quantized weight that can learn: codes and scales are real numbers, and the weight uses them rounded.

    Ŵ = S · (round(V) - z),    S = s · f rounded as stored,    V in code units, f a factor on each scale

A zero point z that is a code stays. A real one learns too: it moves by a shift in code units, and so that its bias
-S · z is rounded as stored.

The gradient treats both roundings as the identity (straight through: Bengio et al., arXiv 1308.3432). It is 0 for a V
outside of the codes. V is kept in float32 only if codes learn: else one byte a weight is enough.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.core import affine_grid, grid
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight

_INSIDE = 0.45  # the largest distance of V from its code at the start: V then rounds to the given code


class Latent(nn.Module):
    """A weight that learns: V [out, groups, size] in code units, a factor on each scale, a shift of real zero points.

    Args:
        hint: the weights before rounding. They set where V starts within its cell: near the edge, the next code is
            almost as good. None: in the middle.
        codes: whether the codes will learn.

    Raises CheckpointError for a weight whose groups are spread over the row.
    """

    V: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self, weight: QuantizedWeight, hint: Float[Tensor, "out in"] | None = None, codes: bool = True
    ) -> None:
        super().__init__()
        if weight.group_of is not None:
            raise CheckpointError("groups that are spread over the row (desc_act) cannot be trained")
        self.bits, self.dtype = weight.bits, weight.scale.dtype
        self.register_buffer("scale", weight.scale[..., None].float())
        is_real = weight.has_real_zeros
        self.register_buffer("zero", weight.zero[..., None].to(torch.float64 if is_real else torch.float32))
        self.factor = nn.Parameter(torch.ones_like(self.scale), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros_like(self.scale), requires_grad=False) if is_real else None
        q = grid.group_view(weight.q, weight.group_size)
        if not codes:
            self.register_buffer("V", q)
            return
        V = q.float()
        if hint is not None:
            inside = grid.group_view(hint, weight.group_size).float() / self.scale + self.zero.float()
            V = torch.maximum(torch.minimum(inside, V + _INSIDE), V - _INSIDE)
        self.V = nn.Parameter(V, requires_grad=False)

    def forward(self) -> Float[Tensor, "out in"]:
        """Return Ŵ, with gradients."""
        W: Any = _Dequantized.apply(self.V, *self._stored_grid(), 2**self.bits - 1)
        return W.flatten(-2)

    def times(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return x Ŵᵀ, with gradients, in the dtype of x. The backward pass makes Ŵ again, so that none is kept."""
        y: Any = _Product.apply(x, self.V, *self._stored_grid(), 2**self.bits - 1)
        return y

    @property
    def grids(self) -> list[nn.Parameter]:
        """Return what learns of the grids."""
        return [self.factor] if self.shift is None else [self.factor, self.shift]

    def _stored_grid(self) -> tuple[Float[Tensor, "out groups 1"], Float[Tensor, "out groups 1"]]:
        """Return scales and zero points in float32, rounded as they would be stored, with gradients."""
        scale = grid.stored_scale(self.scale * self.factor, self.dtype)
        if self.shift is None:
            return scale, self.zero
        exact = self.zero + self.shift
        stored = affine_grid.storable_zero(scale.detach().to(self.dtype), exact.detach())
        return scale, (exact + (stored - exact).detach()).float()

    @torch.no_grad()
    def rounded(self) -> QuantizedWeight:
        """Return the codes and scales as they would be stored now."""
        q = _codes(self.V, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        scale = grid.storable((self.scale * self.factor)[..., 0], self.dtype)
        if self.shift is None:
            return QuantizedWeight(q, scale, self.zero[..., 0].to(torch.uint8), self.bits)
        zero = affine_grid.storable_zero(scale, (self.zero + self.shift)[..., 0])
        return QuantizedWeight(q, scale, zero, self.bits)


def _codes(V: Tensor, highest: int) -> Tensor:
    """Return the codes in a float32 tensor of their own."""
    return V.round().clamp_(0, highest) if V.is_floating_point() else V.float()


def _dense(V: Tensor, scale: Tensor, zero: Tensor, highest: int) -> Tensor:
    """Return Ŵ, in groups."""
    return _codes(V, highest).sub_(zero).mul_(scale)


def _gradients(ctx: Any, gradient: Tensor, V: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of V, scale and zero; None for what does not learn. `gradient`: of Ŵ, in groups, float32."""
    along = _codes(V, ctx.highest).sub_(zero).mul_(gradient).sum(-1, keepdim=True)
    of_zero = -gradient.sum(-1, keepdim=True).mul(scale) if zero.requires_grad else None
    if not V.requires_grad:
        return None, along, of_zero
    # V learns up to half a code outside of the codes. Further out it could only run away.
    inside = (V - ctx.highest / 2).abs_() < (ctx.highest + 1) / 2
    return gradient.mul(scale).mul_(inside), along, of_zero


class _Dequantized(torch.autograd.Function):
    """scale · (nearest code - zero). The backward pass needs only V, scale and zero: no copy is kept."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, scale: Tensor, zero: Tensor, highest: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(V, scale, zero)
        ctx.highest = highest
        return _dense(V, scale, zero, highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_gradients(ctx, gradient, *ctx.saved_tensors), None


class _Product(torch.autograd.Function):
    """x Ŵᵀ. Ŵ is made twice, which is cheap beside the products, and is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, V: Tensor, scale: Tensor, zero: Tensor, highest: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, V, scale, zero)
        ctx.highest = highest
        return x @ _dense(V, scale, zero, highest).flatten(-2).to(x.dtype).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, V, scale, zero = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ _dense(V, scale, zero, ctx.highest).flatten(-2).to(x.dtype)
        if not any(ctx.needs_input_grad[1:4]):
            return of_x, None, None, None, None
        of_W = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).float()
        return of_x, *_gradients(ctx, of_W.view_as(V), V, scale, zero), None
