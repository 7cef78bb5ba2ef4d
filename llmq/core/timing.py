"""Measures how the time of a run is spent."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch


class Clock:
    """Seconds by phase. Phases may nest: the inner one's time is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner, self._started = [0.0], time.perf_counter()

    def go_on(self, total: float, seconds: Mapping[str, float]) -> None:
        """Add the time that an earlier process needed."""
        self._started -= total
        for phase, earlier in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + earlier

    @contextmanager
    def __call__(self, phase: str) -> Generator[None]:
        _wait_for_gpu()
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            _wait_for_gpu()
            elapsed = time.perf_counter() - started
            own = elapsed - self._inner.pop()
            self._inner[-1] += elapsed
            self.seconds[phase] = self.seconds.get(phase, 0.0) + own

    @property
    def total(self) -> float:
        """Return the seconds since the clock was made, plus those of earlier processes."""
        return time.perf_counter() - self._started


def _wait_for_gpu() -> None:
    """Wait until the GPU is idle: calls only queue its work, so the next phase would be charged for it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
