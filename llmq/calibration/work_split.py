"""How the calibration text is divided: micro-batches into shares, shares over processes.

    micro-batches    0 1 2 3 4 | 5 6 7 8 9 | …    at most 8 shares, for any number of processes
    processes            0           1       …    in turns

Sums are made within each share, and the shares are added in their order. So the sums, and with them the result, are the
same bytes for one process and for eight. Further processes get no text; they only share the rows of each solve.
"""

from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from llmq.calibration.texts import Tokens
from llmq.core.distributed import Ranks

# Enough tokens to keep matmuls busy, and few enough for activations to stay in the caches (SmolLM2-135M on 2 cores with
# AVX-512: 4 blocks in 28.7 s; 29.9 s with twice, 31.4 s with four times as many tokens; 2026-11-23).
_TOKENS_PER_RUN = 1024
_SHARES = 8


@dataclass(frozen=True)
class Share:
    """Consecutive micro-batches that one process runs; all of them are held out, or none."""

    rank: int
    batches: range  # indices among the micro-batches of that process; empty in all other processes
    held_out: bool


@dataclass(frozen=True)
class Portion:
    """The calibration text of one process."""

    batches: list[Tensor]  # token ids [samples, length] of each micro-batch; the held-out ones come last
    held_out_from: int  # index of the first held-out micro-batch
    shares: list[Share]  # the shares of all processes, in the order in which they are summed


def portion_of(tokens: Tokens, ranks: Ranks) -> Portion:
    """Return the micro-batches of this process, and the shares of all processes."""
    train, held_out = micro_batches(tokens.train), micro_batches(tokens.held_out)
    owners = [rank for rank, size, _ in _sizes(len(train), len(held_out), ranks.size) for _ in range(size)]
    batches = [batch for batch, rank in zip([*train, *held_out], owners, strict=True) if rank == ranks.rank]
    return Portion(batches, owners[: len(train)].count(ranks.rank), shares_of(len(train), len(held_out), ranks))


def shares_of(train: int, held_out: int, ranks: Ranks) -> list[Share]:
    """Divide these numbers of micro-batches into shares, and give each share to a process."""
    shares, mine = list[Share](), 0
    for rank, size, is_held_out in _sizes(train, held_out, ranks.size):
        own = size if rank == ranks.rank else 0
        shares.append(Share(rank, range(mine, mine + own), is_held_out))
        mine += own
    return shares


def micro_batches(tokens: Int64[Tensor, "samples length"]) -> list[Tensor]:
    """Group whole sequences that run through a block together."""
    return list(tokens.split(max(1, _TOKENS_PER_RUN // tokens.shape[1]))) if len(tokens) else []


def _sizes(train: int, held_out: int, ranks: int) -> list[tuple[int, int, bool]]:
    """Return for each share its process, its number of micro-batches, and whether they are held out."""
    sizes: list[tuple[int, int, bool]] = []
    for count, is_held_out in ((train, False), (held_out, True)):
        shares = min(_SHARES, count)
        for i in range(shares):
            sizes.append((len(sizes) % ranks, count * (i + 1) // shares - count * i // shares, is_held_out))
    return sizes
