"""Measures how the time of a run is spent."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

_MOST_PENDING = 4096  # marks on the GPU that may wait to be read; they take some 400 bytes each


@dataclass(frozen=True)
class _Mark:
    """A point in time: on the host, and on the GPU once that is in use."""

    host: float
    event: Any = None  # a CUDA event: the GPU reaches it when all work before it is done

    def seconds_to(self, later: "_Mark") -> float:
        if self.event is None or later.event is None:
            return later.host - self.host
        return self.event.elapsed_time(later.event) / 1000


def _mark() -> _Mark:
    """Return now. A GPU is not waited for: calls only queue its work, and waiting would leave it idle."""
    event = None
    if torch.cuda.is_initialized():
        event = torch.cuda.Event(enable_timing=True)
        event.record()
    return _Mark(time.perf_counter(), event)


class Clock:
    """Seconds by phase. Phases may nest: the inner one's time is not counted in the outer one.

    The time between two marks belongs to the phase that was the innermost one then.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._phases: list[str] = []  # from the outermost to the innermost
        self._last: _Mark | None = None
        self._pending: list[tuple[str, _Mark, _Mark]] = []
        self._started = time.perf_counter()

    def go_on(self, total: float, seconds: Mapping[str, float]) -> None:
        """Add the time that an earlier process needed."""
        self._started -= total
        for phase, earlier in seconds.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + earlier

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        self._pass_to([*self._phases, phase])
        try:
            yield
        finally:
            self._pass_to(self._phases[:-1])

    def _pass_to(self, phases: list[str]) -> None:
        now = _mark()
        if self._phases and self._last is not None:
            self._pending.append((self._phases[-1], self._last, now))
        self._phases, self._last = phases, now
        if now.event is None or len(self._pending) > _MOST_PENDING:
            self._settle()

    def _settle(self) -> None:
        if self._pending and (event := self._pending[-1][2].event) is not None:
            event.synchronize()
        for phase, start, end in self._pending:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + start.seconds_to(end)
        self._pending.clear()

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase. This waits for the GPU."""
        self._settle()
        return self._seconds

    @property
    def total(self) -> float:
        """Return the seconds since the clock was made, plus those of earlier processes."""
        return time.perf_counter() - self._started
