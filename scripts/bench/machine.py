"""Where a benchmark runs: a GPU, timed in CUDA graphs, or Triton's interpreter on a CPU, to prove the script."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llmq_kernels.choose import Device
from llmq_kernels.op import describe
from llmq_kernels.trial import Timer, time_graph

INTERPRETER = "interpreter"
"""The device's name in toy results, so that nobody takes them for measurements."""


@dataclass(frozen=True)
class Machine:
    """A device and how to time on it."""

    where: torch.device
    device: Device
    timer: Timer
    workers: int
    """Processes for compiling and checking; 0 for none but this."""
    compiler: str
    """Backend of torch.compile."""

    @property
    def toy(self) -> bool:
        return self.device.name == INTERPRETER

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if an earlier launch has broken it."""
        if self.where.type == "cuda":
            torch.cuda.synchronize()


def the_machine(toy: bool) -> Machine:
    """This process's. Raises RuntimeError where there is no GPU, or no interpreter for toys."""
    if toy:
        if not os.environ.get("TRITON_INTERPRET"):
            raise RuntimeError("--toy runs in Triton's interpreter: set TRITON_INTERPRET=1")
        return Machine(torch.device("cpu"), Device(INTERPRETER, 80, 1, 227 << 10), time_plainly, 0, "aot_eager")
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(
            "there is no CUDA GPU here to measure (or TRITON_INTERPRET is set); --toy tries the script out"
        )
    where = torch.device("cuda", torch.cuda.current_device())
    return Machine(where, describe(where), time_graph, max(1, min(14, (os.cpu_count() or 1) - 1)), "inductor")


def time_plainly(launches: Sequence[Callable[[], object]], least: float, replays: int = 2) -> list[float]:  # noqa: ARG001
    """A Timer without graphs: the time that Python takes to launch counts."""
    seconds = []
    for _ in range(replays):
        start = time.perf_counter()
        for launch in launches:
            launch()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / len(launches))
    return seconds


def timed(machine: Machine, launches: Sequence[Callable[[], object]], least: float, replays: int) -> dict[str, Any]:
    """Microseconds per launch: the median and two percentiles of timing it twice, and the median of either time."""
    twice = [[1e6 * seconds for seconds in machine.timer(launches, least, replays)] for _ in range(2)]
    both = sorted(twice[0] + twice[1])
    return {
        "us": round(statistics.median(both), 3),
        "p10": round(both[len(both) // 10], 3),
        "p90": round(both[-1 - len(both) // 10], 3),
        "twice": [round(statistics.median(once), 3) for once in twice],
        "samples": len(both),
    }
