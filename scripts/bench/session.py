"""One call of the benchmark: does tasks until they or the time run out, and survives those that fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.machine import Machine
from bench.plan import Plan
from bench.results import Key, Results


@dataclass(frozen=True)
class Task:
    """Something to measure. Without a key it always runs, and keeps its rows itself."""

    kind: str
    key: Key | None
    work: Callable[[], dict[str, Any] | None]
    ours: bool = True
    """Whether the result depends on our kernels: a failure then fails the benchmark, and a change asks for it again."""
    seconds: float = 3.0
    """About what it takes: it is not begun with less time left."""


@dataclass
class Session:
    """The state of a call."""

    machine: Machine
    plan: Plan
    results: Results
    deadline: float
    """On time.perf_counter's clock."""
    started: float = field(default_factory=time.perf_counter)
    failures: list[str] = field(default_factory=list)
    """What makes the exit code 1."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the table should know besides."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Weights and models, kept between tasks: remaking takes time, and all the layers of a full plan about 20 GB."""
    broken: bool = False

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f}s] {text}", file=sys.stderr, flush=True)

    def fail(self, text: str) -> None:
        """Loudly."""
        self.failures.append(text)
        self.say(f"!!! FAILED {text}")

    def do(self, task: Task) -> bool:
        """Do a task, unless it is done already; False if there was no time for it."""
        name = " ".join([task.kind, *map(str, task.key or ())])
        if self.broken or (task.key is not None and self.results.has(task.kind, task.key)):
            return True
        if self.left() < task.seconds:
            return False
        start = time.perf_counter()
        try:
            row = task.work()
        except Exception as error:  # a peer's failure must not cost the rest
            self._failed(task, name, f"{type(error).__name__}: {error}"[:500])
            return True
        if task.key is not None and row is not None:
            self.results.add(task.kind, task.key, row, task.ours)
        self.say(f"{name} ({time.perf_counter() - start:.1f}s)")
        return True

    def _failed(self, task: Task, name: str, reason: str) -> None:
        if task.key is not None:
            self.results.add(task.kind, task.key, {"failed": reason}, task.ours)
        if task.ours:
            self.fail(f"{name}: {reason}")
        else:
            self.notes.append(f"{name}: {reason}")
            self.say(f"{name} failed: {reason}")
        try:
            self.machine.synchronize()
        except RuntimeError as error:
            self.broken = True
            self.fail(f"the GPU answers no more after {name}: {error}")
