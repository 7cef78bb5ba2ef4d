"""Describe the machine of a benchmark: a GPU timed with CUDA graphs, or Triton's interpreter for toy runs on a CPU."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from llmq_kernels.choose import Device
from llmq_kernels.op import describe
from llmq_kernels.trial import Timer, time_graph

INTERPRETER = "interpreter"
"""Device name in the results of toy runs, so that nobody takes them for measurements."""


@dataclass(frozen=True)
class Machine:
    """A device, and how to time kernels on it."""

    where: torch.device
    device: Device
    timer: Timer
    workers: int
    """Number of processes for compiling and checking; 0 means that this process does it."""
    compiler: str
    """Backend for torch.compile."""

    @property
    def toy(self) -> bool:
        return self.device.name == INTERPRETER

    def synchronize(self) -> None:
        """Wait for the device. Raises RuntimeError if an earlier launch has broken it."""
        if self.where.type == "cuda":
            torch.cuda.synchronize()


def the_machine(toy: bool) -> Machine:
    """Return the machine of this process. Raises RuntimeError if there is no GPU, or no interpreter for a toy run."""
    if toy:
        if not os.environ.get("TRITON_INTERPRET"):
            raise RuntimeError("--toy runs in Triton's interpreter; set TRITON_INTERPRET=1")
        return Machine(torch.device("cpu"), Device(INTERPRETER, 80, 1, 227 << 10), time_plainly, 0, "aot_eager")
    if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET"):
        raise RuntimeError(
            "found no CUDA GPU to measure, or TRITON_INTERPRET is set; --toy tries the script without a GPU"
        )
    where = torch.device("cuda", torch.cuda.current_device())
    return Machine(where, describe(where), time_graph, max(1, min(14, (os.cpu_count() or 1) - 1)), "inductor")


def about() -> dict[str, Any]:
    """Return what there is: the GPU, the memory, the versions of what computes. Says the same on stderr, at length."""
    said = {name: _output(command) for name, command in _ABOUT.items()}
    said["memory"] = "\n".join(Path("/proc/meminfo").read_text("utf-8").splitlines()[:3])
    print("\n".join(said.values()), file=sys.stderr)
    versions = {name: _version(name) for name in _PACKAGES}
    print(versions, file=sys.stderr)
    return {"python": platform.python_version(), "cores": os.cpu_count(), "versions": versions, **said}


_ABOUT = {
    "nvidia-smi": ("nvidia-smi",),
    "gpu": ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader"),
}
_PACKAGES = ("torch", "triton", "transformers", "numpy", "gemlite", "humming-kernels", "beartype", "pytest-xdist")


def _output(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def time_plainly(launches: Sequence[Callable[[], object]], least: float, replays: int = 2) -> list[float]:  # noqa: ARG001
    """Return seconds per launch, measured without graphs. The time of Python's launching code counts too."""
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
    """Time the launches twice. Returns microseconds per launch: median and two percentiles, and both medians."""
    twice = [[1e6 * seconds for seconds in machine.timer(launches, least, replays)] for _ in range(2)]
    both = sorted(twice[0] + twice[1])
    return {
        "us": round(statistics.median(both), 3),
        "p10": round(both[len(both) // 10], 3),
        "p90": round(both[-1 - len(both) // 10], 3),
        "twice": [round(statistics.median(once), 3) for once in twice],
        "samples": len(both),
    }
