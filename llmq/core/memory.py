"""Memory: how much this program takes, how much is free, and how to give it back."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import torch


class PeakMemory:
    """Measure the largest resident memory of this program: since the last look, and in all."""

    def __init__(self) -> None:
        self._before = 0

    def take(self) -> int:
        """Return the peak in bytes since the last call. Only Linux can restart it; elsewhere it is the peak in all."""
        peak = resident_peak()
        self._before = max(self._before, peak)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return peak

    @property
    def largest(self) -> int:
        """Return the peak in all, in bytes."""
        return max(self._before, resident_peak())


def gpu_peak() -> int | None:
    """Return the most bytes that tensors have taken on the GPU since the program began; None if it is not in use."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def resident_peak() -> int:
    """Return the peak in bytes since the program began, or since PeakMemory was last asked."""
    if sys.platform == "linux":
        # Not ru_maxrss: a child inherits it from the process that started it.
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_now() -> int:
    """Return the bytes that this program has in memory now."""
    return psutil.Process().memory_info().rss


def release_memory() -> None:
    """Give freed memory back to the system, if the C library can do that (glibc).

    glibc keeps the tens of megabytes that every block allocates and frees, fragmented: without this a run on a
    30-block model grew by 40 MB per block (2026-11-22, 64x512 calibration tokens).
    """
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this program can still take on a device.

    On a CPU: what the machine has available, or what the limits of its containers (cgroups) leave, if that is less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *left_by_cgroups(Path("/"))])


def left_by_cgroups(root: Path) -> Iterator[int]:
    """Yield the bytes that each memory limit on this process leaves. `root`: of the file system.

    A process is in one cgroup and in all above it. Inside a container the path in /proc/self/cgroup may not exist; then
    the limits are at the top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        if controllers:  # version 1
            if "memory" not in controllers.split(","):
                continue
            top, limit, usage = top / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        inner = top / path.lstrip("/")
        for group in (inner, *inner.parents):
            if group.is_relative_to(top):
                with suppress(OSError, ValueError):  # no limit: the file is missing or says "max"
                    used = int((group / usage).read_text()) - _reclaimable(group, cache)
                    yield max(0, int((group / limit).read_text()) - used)


def _reclaimable(group: Path, entry: str) -> int:
    """Return the bytes of cached files that the system drops when a program wants memory."""
    with suppress(OSError):
        for name, _, size in (line.partition(" ") for line in (group / "memory.stat").read_text().splitlines()):
            if name == entry:
                return int(size)
    return 0
