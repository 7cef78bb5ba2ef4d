"""A quantized weight that can learn: codes and scales as real numbers that are rounded on the way to the weight.

    Ŵ = s · f · (round(V) - z),    V in codes, f a factor on each scale

Gradients pass through the rounding as if it were not there (straight through), except where V has left the codes.
"""

# torch annotates only part of itself: what it leaves unknown is not reported here.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq import grid
from llmq.weight import QuantizedWeight

_INSIDE = 0.45  # how far from its code a latent weight may start, so that the start rounds to the codes given


class Latent(nn.Module):
    """What is learned of one weight: V [out, groups, size] in codes, and a factor on each scale.

    Args:
        hint: the weights before rounding. They tell where within its cell a latent weight starts: near a code that
            would suit as well, or in the middle where nothing is known.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: QuantizedWeight, hint: Float[Tensor, "out in"] | None = None) -> None:
        super().__init__()
        self.bits, self.dtype = weight.bits, weight.scale.dtype
        self.register_buffer("scale", weight.scale[..., None].float())
        self.register_buffer("zero", weight.zero[..., None].float())
        q = grid.group_view(weight.q, weight.group_size).float()
        if hint is not None:
            inside = grid.group_view(hint, weight.group_size) / self.scale + self.zero
            q = torch.maximum(torch.minimum(inside, q + _INSIDE), q - _INSIDE)
        self.V = nn.Parameter(q)
        self.factor = nn.Parameter(torch.ones_like(self.scale))

    def forward(self) -> Float[Tensor, "out in"]:
        """Ŵ, with gradients."""
        codes: Any = _Round.apply(self.V, 2**self.bits - 1)
        return (self.scale * self.factor * (codes - self.zero)).flatten(-2)

    @torch.no_grad()
    def rounded(self) -> QuantizedWeight:
        """The codes and scales as they would be stored now."""
        q = self.V.round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(-2)
        scale = grid.storable((self.scale * self.factor)[..., 0], self.dtype)
        return QuantizedWeight(q, scale, self.zero[..., 0].to(torch.uint8), self.bits)


class _Round(torch.autograd.Function):
    """Nearest code; the gradient passes where V is within half a step of the codes."""

    @staticmethod
    def forward(ctx: Any, V: Tensor, highest: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward((V + 0.5) * (highest + 0.5 - V) > 0)
        return V.round().clamp_(0, highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


def batches(count: int, size: int, steps: int) -> Iterator[list[int]]:
    """Indices of `size` of `count` samples for each step, shuffled anew whenever less than a batch is left."""
    order, waiting = torch.Generator().manual_seed(0), []
    size = min(size, count)
    for _ in range(steps):
        if len(waiting) < size:
            waiting = torch.randperm(count, generator=order).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
