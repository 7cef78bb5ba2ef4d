"""Sums over the calibration text, in the same bits whatever the number of processes.

process 0    s0 ─────► s2 ─────► s4 …          each sums up its own shares of the text, one after the other
process 1    s1 ──┐──► s3 ──┐──► s5 …
the first     s0 + s1   + s2 + s3 …            shares are added in their order, some of them late:
                                               nobody waits for another who takes a little longer
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llmq.calibration.work_split import Share
from llmq.core.distributed import Ranks

# Shares by which another process may be ahead or behind, and the memory for it. Without, two processes waited for each
# other 9 s in 112 s (SmolLM2-135M on 2 cores, 2026-11-26).
_AHEAD, _AHEAD_BYTES = 2, 1 << 27


class ShareSums:
    """Tensors of several names that grow within a share, and those of all shares, in the first process.

    There are sums of two kinds, over held-out text and over the rest; shares of one kind follow those of the other.

    Args:
        shapes: by name.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], ranks: Ranks, device: torch.device) -> None:
        self._shapes, self._ranks, self._device = shapes, ranks, device
        self._whole: dict[tuple[str, bool], Tensor] = {}
        self._growing: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}
        self._waiting: deque[tuple[bool, dict[str, Tensor], list[Callable[[], None]]]] = deque()
        """Those of shares that are on their way to the first process, or behind one that is."""
        self._ahead = shares_ahead(shapes, ranks)

    def growing(self, name: str) -> Tensor:
        """A sum within the current share, zero at first."""
        if name not in self._growing:
            self._growing[name] = self._empty(name).zero_()
        return self._growing[name]

    def fold(self, share: Share) -> None:
        """A share, of whichever process, is finished."""
        if share.rank == self._ranks.rank:
            parts, self._growing = {name: self.growing(name) for name in self._shapes}, {}
            sent = [] if self._ranks.is_first else [self._ranks.send(part) for part in parts.values()]
            self._waiting.append((share.held_out, parts, sent))
        elif self._ranks.is_first:
            parts = {name: self._empty(name) for name in self._shapes}
            received = [self._ranks.receive(part, share.rank) for part in parts.values()]
            self._waiting.append((share.held_out, parts, received))
        self._settle(self._ahead)

    def finish(self) -> dict[tuple[str, bool], Tensor]:
        """The sums over all shares by name and whether over held-out text, in the first process; empty in others."""
        self._settle(0)
        self._spare.clear()
        return self._whole

    def _settle(self, left: int) -> None:
        """Wait until so many shares are left to wait for."""
        while len(self._waiting) > left:
            held_out, parts, waits = self._waiting.popleft()
            for wait in waits:
                wait()
            for name, part in parts.items() if self._ranks.is_first else ():
                if (name, held_out) in self._whole:
                    self._whole[name, held_out] += part
                    self._spare[name] = part
                else:
                    self._whole[name, held_out] = part

    def _empty(self, name: str) -> Tensor:
        spare = self._spare.pop(name, None)
        return torch.empty(*self._shapes[name], device=self._device) if spare is None else spare


def shares_ahead(shapes: Mapping[str, Sequence[int]], ranks: Ranks) -> int:
    """How many shares may wait for others, beside the one that grows."""
    if ranks.size == 1:
        return 0
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    return max(0 if ranks.is_first else 1, min(_AHEAD, _AHEAD_BYTES // size))
