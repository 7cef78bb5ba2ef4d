"""Runs that end before their time, and what they leave: stopped by a signal or the disk, or one of several killed.

Each is met when two blocks are finished, must end by itself, and is gone on with.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from soak import blocks_finished, differing, finish, hashes, resumed

from llmq.core.errors import WorkError

PATIENCE = 60  # seconds until whatever is stopped must have ended


def interrupted(words: list[str], how: str, expected: dict[str, str]) -> list[str]:
    """What was wrong with a run that met one of STOPS between two blocks, or with how it was gone on with."""
    output = Path(words[-1])
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, preexec_fn=_like_a_user)
    try:
        _wait_for_blocks(process, output)
        STOPS[how](process, output)
        said = process.communicate(timeout=PATIENCE)[1].splitlines()
    except subprocess.TimeoutExpired:
        return [f"goes on for {PATIENCE} s"]
    finally:
        process.kill()
        process.wait()
        _protect(output, False)
    wrong = [] if process.returncode == 1 else [f"exits with {process.returncode}"]
    errors = [i for i, line in enumerate(said) if line.startswith("error: ")]
    if len(errors) != 1 or len(said) - errors[0] > 2 or any(line.startswith("Traceback") for line in said):
        wrong.append(f"says {said[-5:]}")
    return wrong + _resumed(words, expected)


def dead_process(words: list[str], rank: int, expected: dict[str, str]) -> tuple[float, list[str]]:
    """Seconds until all of several processes had ended when one was killed between two blocks, and what was wrong."""
    launcher, workers = subprocess.Popen(words, stderr=subprocess.DEVNULL), dict[int, int]()
    try:
        _wait_for_blocks(launcher, Path(words[-1]))
        workers, started = _workers(launcher.pid), time.perf_counter()
        os.kill(workers[rank], signal.SIGKILL)
        while launcher.poll() is None or any(map(_is_running, workers.values())):
            if time.perf_counter() - started > PATIENCE:
                return math.inf, [f"some process goes on for {PATIENCE} s"]
            time.sleep(0.01)
        seconds = time.perf_counter() - started
    finally:
        for pid in filter(_is_running, (launcher.pid, *workers.values())):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()
    return seconds, ([] if launcher.returncode else ["exits with 0"]) + _resumed(words, expected)


def _resumed(words: list[str], expected: dict[str, str]) -> list[str]:
    """What is wrong with what an interrupted run left, and with what --resume makes of it."""
    wrong = ["leaves a config.json"] if (Path(words[-1]) / "config.json").exists() else []
    try:
        finish(resumed(words))
    except WorkError as error:
        wrong.append(str(error))
    others = differing(hashes(Path(words[-1])), expected)
    return wrong + [f"ends with other bytes in {others}"] * bool(others)


def _wait_for_blocks(process: subprocess.Popen[Any], output: Path) -> None:
    while process.poll() is None and blocks_finished(output) < 2:
        time.sleep(0.002)
    if process.poll() is not None:
        raise WorkError(f"the run into {output} ended, with {process.returncode}, before it could be stopped")


def _like_a_user() -> None:
    """In a child: write protection counts, of which root is free, and Ctrl-C, to which background jobs are deaf."""
    ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _fill_disk(process: subprocess.Popen[Any], _: Path) -> None:
    """From now on no file takes another byte."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def _protect(output: Path, protected: bool) -> None:
    """Make all of a directory read-only, or no longer."""
    for path in (output, *output.rglob("*")):
        with suppress(FileNotFoundError):  # by now
            path.chmod(path.stat().st_mode & ~0o222 if protected else path.stat().st_mode | 0o200)


STOPS: dict[str, Callable[[subprocess.Popen[Any], Path], None]] = {
    "a full disk": _fill_disk,
    "an output made read-only": lambda _, output: _protect(output, True),
    "Ctrl-C": lambda process, _: process.send_signal(signal.SIGINT),
    "SIGTERM": lambda process, _: process.send_signal(signal.SIGTERM),
}


def _workers(launcher: int) -> dict[int, int]:
    """Process ids of what torchrun started, by rank."""
    children = [pid for path in Path(f"/proc/{launcher}/task").glob("*/children") for pid in path.read_text().split()]
    ranks = {pid: re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()) for pid in children}
    return {int(rank[1]): int(pid) for pid, rank in ranks.items() if rank}


def _is_running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
