"""How the calibration text is split: micro-batches into shares, shares over processes.

    micro-batches    0 1 2 3 4 | 5 6 7 8 9 | …    at most 8 shares, however many processes there are
    processes            0           1       …    in turns

Statistics are summed within a share, and shares are summed in their order. So the sums, and with them the result, are
the same bytes for one process and for eight. More than eight share the rows of each solve, but not the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from llmq.calibration.texts import Tokens
from llmq.core.distributed import Ranks

# Enough to keep matmuls busy: what a run needs beside its results stays in the caches (SmolLM2-135M on 2 cores with
# AVX-512: 4 blocks in 28.7 s; 29.9 s with twice, 31.4 s with four times as many; 2026-11-23).
_TOKENS_PER_RUN = 1024
_SHARES = 8


@dataclass(frozen=True)
class Share:
    """Consecutive micro-batches of one kind that one process runs."""

    rank: int
    batches: range
    """Indices among the micro-batches of that process; empty in all others."""
    held_out: bool


@dataclass(frozen=True)
class Portion:
    """What one process has of the calibration text."""

    batches: list[Tensor]
    """[samples, length] token ids each: its micro-batches, the held-out ones last."""
    held_out_from: int
    shares: list[Share]
    """Of all processes, in the order in which they are summed."""


def portion_of(tokens: Tokens, ranks: Ranks) -> Portion:
    """The part of this process."""
    train, held_out = micro_batches(tokens.train), micro_batches(tokens.held_out)
    shares = shares_of(len(train), len(held_out), ranks)
    owners = [rank for rank, size, _ in _sizes(len(train), len(held_out), ranks.size) for _ in range(size)]
    batches = [batch for batch, rank in zip([*train, *held_out], owners, strict=True) if rank == ranks.rank]
    return Portion(batches, owners[: len(train)].count(ranks.rank), shares)


def shares_of(train: int, held_out: int, ranks: Ranks) -> list[Share]:
    """The shares of so many micro-batches."""
    shares: list[Share] = []
    mine = 0
    for rank, size, kind in _sizes(train, held_out, ranks.size):
        own = size if rank == ranks.rank else 0
        shares.append(Share(rank, range(mine, mine + own), kind))
        mine += own
    return shares


def micro_batches(tokens: Int64[Tensor, "samples length"]) -> list[Tensor]:
    """Whole sequences that run through a block together."""
    return list(tokens.split(max(1, _TOKENS_PER_RUN // tokens.shape[1]))) if len(tokens) else []


def _sizes(train: int, held_out: int, ranks: int) -> list[tuple[int, int, bool]]:
    """(process, micro-batches, whether they are held out) of each share."""
    found: list[tuple[int, int, bool]] = []
    for count, kind in ((train, False), (held_out, True)):
        shares = min(_SHARES, count)
        for i in range(shares):
            found.append((len(found) % ranks, count * (i + 1) // shares - count * i // shares, kind))
    return found
