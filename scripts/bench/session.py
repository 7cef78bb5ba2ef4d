"""Run the tasks of one benchmark until all are done or the time is over. A task that fails does not stop the others."""

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
    """Something to measure. A task without a key always runs, and writes its rows itself."""

    kind: str
    key: Key | None
    work: Callable[[], dict[str, Any] | None]
    ours: bool = True
    """Whether the result depends on our kernels. Then a failure fails the benchmark, and new kernels need a new row."""
    seconds: float = 3.0
    """About how long it takes. It is not started if less time is left."""


@dataclass
class Session:
    """The state of one call of the benchmark."""

    machine: Machine
    plan: Plan
    results: Results
    deadline: float
    """End of the time, on the clock of time.perf_counter."""
    started: float = field(default_factory=time.perf_counter)
    failures: list[str] = field(default_factory=list)
    """Failures of our kernels. If there are any, the exit code is 1."""
    late: list[str] = field(default_factory=list)
    """What was not done in time. It is no failure."""
    notes: list[str] = field(default_factory=list)
    """Other things that a reader of the table should know."""
    cache: dict[Any, Any] = field(default_factory=dict)
    """Weights and models that tasks share, because making them takes time. All layers of the full plan take 20 GB."""
    broken: bool = False

    def left(self) -> float:
        return self.deadline - time.perf_counter()

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f}s] {text}", file=sys.stderr, flush=True)

    def fail(self, text: str) -> None:
        """Add a failure and print it."""
        self.failures.append(text)
        self.say(f"!!! FAILED {text}")

    def do(self, task: Task) -> None:
        """Run a task if it is not done already and there is time for it."""
        name = " ".join([task.kind, *map(str, task.key or ())])
        if self.broken or (task.key is not None and self.results.has(task.kind, task.key)):
            return
        if self.left() < task.seconds:
            self.late += [name] if task.key is not None else []
            return
        start = time.perf_counter()
        try:
            row = task.work()
        except TimeoutError as error:
            self.late.append(name)
            self.say(f"{name}: {error}")
            return
        except Exception as error:  # one failure must not stop the other tasks
            self._failed(task, name, f"{type(error).__name__}: {error}"[:500])
            return
        if task.key is not None and row is not None:
            self.results.add(task.kind, task.key, row, task.ours)
        self.say(f"{name} ({time.perf_counter() - start:.1f}s)")

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
            self.fail(f"the GPU stopped working after {name}; no further task runs: {error}")
