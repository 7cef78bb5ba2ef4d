"""How much memory this process takes, how much is free, and how to give some back."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil
import torch

# Per version of Linux cgroups (2, 1): files with the limit and the use; entry of memory.stat with the disk cache, which
# the kernel counts as use but drops on demand.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class PeakMemory:
    """The largest resident memory of this process: since the last look, and since it began."""

    def __init__(self) -> None:
        self._before = 0

    def take(self) -> int:
        """Return the peak in bytes since the last call. Where the system cannot reset it (not Linux): since the start."""
        peak = resident_peak()
        self._before = max(self._before, peak)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        return peak

    @property
    def largest(self) -> int:
        """Return the peak in bytes since the process began."""
        return max(self._before, resident_peak())


def resident_peak() -> int:
    """Return the peak of resident memory in bytes, since the process began or PeakMemory last reset it."""
    if sys.platform == "linux":
        # Not ru_maxrss: a child inherits it from the process that started it. psutil has no peak on Linux.
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_now() -> int:
    """Return the resident memory of this process in bytes."""
    return psutil.Process().memory_info().rss


def release_memory() -> None:
    """Give freed memory back to the system, if the C library can do that (glibc).

    Every block allocates and frees tens of megabytes, which glibc keeps in fragments. Without this call a run on a
    30-block model grew by 40 MB per block (2026-11-22, 64x512 calibration tokens).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Return how many bytes this process can still allocate on the device.

    On the CPU, this is the available memory of the machine, or less if the container has a limit.

    Args:
        root: the root of the file system; a test passes another one.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    left = (_left_in(directory) for directory in _memory_cgroups(root))
    return min([psutil.virtual_memory().available, *(n for n in left if n is not None)])


def _memory_cgroups(root: Path) -> Iterator[Path]:
    """Yield the directories of this process' memory cgroup and of all its parents; their limits hold too."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, name = line.partition(":")[2].partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")  # version 2 names no controllers
        path = PurePosixPath(name.lstrip("/"))
        yield from (mount / part for part in (path, *path.parents))


def _left_in(cgroup: Path) -> int | None:
    """Return the bytes that the limit of one cgroup leaves; None if it has no limit that can be read."""
    for limit_file, use_file, cache_entry in _CGROUP_FILES:
        limit = _text(cgroup / limit_file).strip()
        if limit.isdigit():  # otherwise "max", or absent
            use = _text(cgroup / use_file).strip()
            entries = dict(line.split(maxsplit=1) for line in _text(cgroup / "memory.stat").splitlines() if " " in line)
            held = int(use if use.isdigit() else 0) - int(entries.get(cache_entry, 0))
            return max(0, int(limit) - max(0, held))
    return None


def _text(path: Path) -> str:
    """Return the content of a file, or nothing if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
