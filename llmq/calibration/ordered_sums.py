"""Sums over the calibration text that have the same bits for any number of processes.

process 0     s0 ─────► s2 ─────► s4 …         each process sums its own shares of the text, one after the other
process 1     s1 ──┐──► s3 ──┐──► s5 …
in process 0  s0 + s1   + s2 + s3 …            shares are added in their order; some arrive late, so that
                                               a process need not wait for a slightly slower one
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from llmq.calibration.work_split import Share
from llmq.core.distributed import Ranks

# Number of shares that a process may be ahead of another, and the memory for them. With 0, two processes waited for
# each other 9 s in 112 s (SmolLM2-135M on 2 cores, 2026-11-26).
_AHEAD, _AHEAD_BYTES = 2, 1 << 27


class ShareSums:
    """Named tensors that are summed within a share, then over all shares in the first process.

    Held-out text and the other text have separate sums. The shares of one come after all shares of the other.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], ranks: Ranks, device: torch.device) -> None:
        self._shapes, self._ranks, self._device = shapes, ranks, device
        self._totals: dict[tuple[str, bool], Tensor] = {}
        self._growing: dict[str, Tensor] = {}
        self._spare: dict[str, Tensor] = {}
        # Finished shares that are still being sent, or that come after one that is: whether held out, sums, waits.
        self._pending: deque[tuple[bool, dict[str, Tensor], list[Callable[[], None]]]] = deque()
        self._ahead = shares_ahead(shapes, ranks)

    def growing(self, name: str) -> Tensor:
        """Return the sum within the current share, to add to; it starts at zero."""
        if name not in self._growing:
            self._growing[name] = self._empty(name).zero_()
        return self._growing[name]

    def fold(self, share: Share) -> None:
        """Finish a share. Every process calls this for each share, in the same order."""
        if share.rank == self._ranks.rank:
            sums, self._growing = {name: self.growing(name) for name in self._shapes}, {}
            waits = [] if self._ranks.is_first else [self._ranks.send(tensor) for tensor in sums.values()]
            self._pending.append((share.held_out, sums, waits))
        elif self._ranks.is_first:
            sums = {name: self._empty(name) for name in self._shapes}
            self._pending.append((share.held_out, sums, [self._ranks.receive(t, share.rank) for t in sums.values()]))
        self._settle(self._ahead)

    def finish(self) -> dict[tuple[str, bool], Tensor]:
        """Return the sums over all shares by (name, held out) in the first process; nothing in the others."""
        self._settle(0)
        self._spare.clear()
        return self._totals

    def _settle(self, left: int) -> None:
        """Add pending shares to the totals, in order, until `left` of them are left."""
        while len(self._pending) > left:
            held_out, sums, waits = self._pending.popleft()
            for wait in waits:
                wait()
            for name, tensor in sums.items() if self._ranks.is_first else ():
                if (name, held_out) in self._totals:
                    self._totals[name, held_out] += tensor
                    self._spare[name] = tensor
                else:
                    self._totals[name, held_out] = tensor

    def _empty(self, name: str) -> Tensor:
        spare = self._spare.pop(name, None)
        return torch.empty(*self._shapes[name], device=self._device) if spare is None else spare


def shares_ahead(shapes: Mapping[str, Sequence[int]], ranks: Ranks) -> int:
    """Return how many finished shares may be pending in a process, besides the one that grows."""
    if ranks.size == 1:
        return 0
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    return max(0 if ranks.is_first else 1, min(_AHEAD, _AHEAD_BYTES // size))
