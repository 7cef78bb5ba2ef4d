"""What the algorithms know about a group's inputs X [tokens, in], gathered while the block runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llmq.arch import Group, linear_of
from llmq.clock import Clock
from llmq.stream import Block

# Only the lower triangle of XᵀX is computed, in strips of this many columns: a third less arithmetic at 1536 columns
# and still wide enough for full matmul speed (2-core AVX2 machine, 2026-11: 256 and 512 alike, 128 a tenth slower).
_STRIP = 256


@dataclass
class InputStatistics:
    """Second moments of one group's input. All algorithms consume these and only these, so all of them compose."""

    H: Float[Tensor, "in in"]
    """XᵀX / tokens in float32 (the Hessian of the layer's squared output error, up to a factor of 2)."""
    H_val: Float[Tensor, "in in"]
    """The same over held-out tokens; equal to H when none are held out."""
    mean_abs: Float[Tensor, "in"]
    """Mean |x| per input channel."""
    tokens: int
    dropped: int
    """Token rows left out because they held NaN or infinity."""


def collect_statistics(block: Block, groups: list[Group], clock: Clock) -> list[InputStatistics]:
    """Run the block over all its micro-batches and gather the statistics of every group's input."""
    firsts = [linear_of(block.module, group.linears[0]) for group in groups]
    sums: dict[nn.Module, _Sums] = {first: _Sums(first.in_features, block.device) for first in firsts}
    held_out = False

    def note(first: nn.Module, args: tuple[Tensor]) -> None:
        with clock("statistics"):
            sums[first].add(args[0], held_out)

    handles = [first.register_forward_pre_hook(note) for first in firsts]
    try:
        for i, micro_batch in enumerate(block.hidden):
            held_out = i >= block.held_out_from
            with clock("forward"):
                block.run(micro_batch)
    finally:
        for handle in handles:
            handle.remove()
    with clock("statistics"):
        return [sums[first].finish() for first in firsts]


class _Sums:
    """Running sums over token rows; only the lower triangles are filled until `finish`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.H = torch.zeros(width, width, device=device)
        self.H_val = torch.zeros(width, width, device=device)
        self.abs = torch.zeros(width, device=device)
        self.tokens = self.tokens_val = self.dropped = 0

    def add(self, x: Tensor, held_out: bool) -> None:
        X = x.flatten(0, -2).float()
        # One reduction finds the rare bad batch: a sum is finite only if every term is.
        if not bool(torch.isfinite(X.sum())):
            finite = torch.isfinite(X).all(1)
            self.dropped += int((~finite).sum())
            X = X[finite]
        if held_out:
            self.tokens_val += len(X)
            _add_lower(self.H_val, X)
        else:
            self.tokens += len(X)
            self.abs += X.abs().sum(0)
            _add_lower(self.H, X)

    def finish(self) -> InputStatistics:
        H = _mirrored(self.H, self.tokens)
        H_val = _mirrored(self.H_val, self.tokens_val) if self.tokens_val else H
        return InputStatistics(H, H_val, self.abs / max(1, self.tokens), self.tokens, self.dropped)


def _add_lower(H: Tensor, X: Tensor) -> None:
    for start in range(0, len(H), _STRIP):
        stop = min(start + _STRIP, len(H))
        H[start:stop, :stop].addmm_(X[:, start:stop].T, X[:, :stop])


def _mirrored(lower: Tensor, tokens: int) -> Tensor:
    # Within a strip the square on the diagonal is full already, hence tril first.
    return (lower.tril() + lower.tril(-1).T) / max(1, tokens)
