"""The choice of a tile for a problem. It is a pure function, so the tests compile and check every answer it can give.

A table measured on this kind of GPU, with these kernels and this Triton, wins. Otherwise the rule below decides.
Nothing is timed at first use: `python -m llmq.tune` measures, when asked, and writes a table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmq_kernels.layout import WIDTHS, block_of, plane_of

# Programs per multiprocessor that the rule splits K for: enough 16-byte copies in flight to cover memory latency
# (4 x 3 stages x 8 KB of words, where an H200 needs about 30 KB), few enough that the sums stay small beside the words.
_PROGRAMS_PER_SM = 4
_REGISTERS_PER_SM = 65536
_MIN_BLOCKS_PER_SPLIT = 2
_ROOM_FOR_TALL_TILES = 200  # registers for 2 bit on sm_80, whole K: the compiler aims at 96 otherwise, and spills
# Tokens that a step multiplies, of all planes: the compiler unrolls the planes and loads ahead. With twice as many,
# some kernels for sm_80 spill.
_TOKENS_PER_WARP = 2048
_DEQUANTIZE_ABOVE = 256
M_BUCKETS = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)
COUNTERS = 4096
"""The most tiles of a launch with a split K: each needs a counter of its layer."""


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that the choice depends on."""

    name: str
    arch: int
    """Compute capability, 90 for 9.0."""
    multiprocessors: int
    shared_bytes: int
    """Shared memory one block may ask for."""


@dataclass(frozen=True)
class Problem:
    """y[M, N] = x[M, K] Wᵀ with `bits` codes in groups; dtype is float16 or bfloat16."""

    bits: int
    group_size: int
    symmetric: bool
    dtype: str
    M: int
    N: int
    K: int

    @property
    def plane(self) -> int:
        return plane_of(self.group_size, self.K)

    @property
    def blocks(self) -> int:
        return -(-self.K // block_of(self.bits, self.plane))

    @property
    def planes(self) -> int:
        return block_of(self.bits, self.plane) // self.plane

    @property
    def has_kernel(self) -> bool:
        """Tell if a kernel takes it: 16-bit dtype, groups of a whole row or of a power of two from 16 on."""
        whole, size = self.group_size == self.K, self.group_size
        return self.dtype in ("float16", "bfloat16") and (whole or (size >= 16 and size & (size - 1) == 0))


@dataclass(frozen=True)
class Tile:
    """How packed_matmul cuts a problem up. None instead of a Tile means: dequantize first, then multiply."""

    BM: int
    BN: int
    warps: int
    stages: int
    splits: int = 1
    chunk: int = 64
    """Word columns per step; a divisor of the plane."""
    fold: bool = False
    """Scale weights instead of sums."""
    pdl: bool = False
    """Start while the previous kernel ends (sm_90)."""
    registers: int | None = None
    """Most that a thread may have. Told nothing, the compiler aims at round numbers: it takes more than the resident
    programs have, or spills a value. Told 128, it needs 1.95 instead of 2.05 instructions per 4-bit weight. But told
    255, it loads so far ahead for tall tiles and whole planes of 3 bit that they spill."""


def choose(device: Device, problem: Problem, tables: Sequence[dict[str, Any]] = ()) -> Tile | None:
    """Return the tile for a problem, or None if dequantizing first is better. Earlier tables win."""
    for table in tables:
        row = _nearest(table["rows"], problem)
        if row is not None:
            return None if row["tile"] is None else _fitted(Tile(**row["tile"]), problem)
    return rule(device, problem)


def rule(device: Device, problem: Problem) -> Tile | None:
    """Return the analytic choice. It is not measured on any GPU yet: its tiles compile without spills and fit."""
    if problem.M > _DEQUANTIZE_ABOVE:
        return None
    # A tall tile does not go into registers with sixteen planes, as many groups, or sums of splits for such an odd N.
    tall = 64 if problem.N % 16 == 0 else 32
    tallest = (tall if problem.plane > 16 else 16) if problem.planes < 16 else (16 if problem.plane > 16 else 8)
    in_two = len(WIDTHS[problem.bits]) == 2
    BM = min(tallest, max(8, 1 << math.ceil(math.log2(problem.M))))
    BN, warps = (128, 8) if BM == 64 else (64, 4)
    older = device.arch < 90
    uneven = problem.K % block_of(problem.bits, problem.plane) > 0
    many = problem.group_size == 64
    # Sixteen whole planes at a time spill a few registers for sm_80, for groups that span blocks, for groups of 64 with
    # zero points or a K that does not fill them. For sm_80 three stages do, too, and 16 tokens with groups of 64. Whole
    # planes of 6 bit spill for groups of 64 and such a K, in experts of bfloat16.
    half = problem.planes == 16 and problem.plane > 16
    half &= older or uneven or problem.group_size > 128 or (many and not problem.symmetric)
    half |= problem.bits == 6 and many and uneven
    chunk = problem.plane // 2 if half else problem.plane
    tight = older and (BM == 64 or (problem.planes == 16 and BM == 16 and many))
    most = _TOKENS_PER_WARP * warps // (2 if tight else 1)
    while problem.planes * chunk * BM > most and chunk > 16:
        chunk //= 2

    def shared(stages: int) -> int:
        return shared_bytes(problem, BM, BN, stages - 1, chunk, device.arch)

    # By their registers. Codes in two arrays of words need more.
    places = min(2 if in_two else 4, {8: _PROGRAMS_PER_SM, 16: 3, 32: 2, 64: 1}[BM])
    stages = 2 if older and BM == 8 else 3
    while stages > 2 and _resident(device, shared(stages)) < places:
        stages -= 1
    while chunk > 16 and shared(stages) > device.shared_bytes:
        chunk //= 2
    programs = min(places, _resident(device, shared(stages)))
    registers = None if problem.planes == 16 and chunk == 64 else registers_for(BM, warps, places)
    tile = Tile(BM, BN, warps, stages, chunk=chunk, registers=registers)
    tile = split(tile, device, problem, programs)
    if older and problem.bits == 2 and BM in (16, 32) and tile.splits == 1:
        tile = replace(tile, registers=_ROOM_FOR_TALL_TILES)
    return tile


def split(tile: Tile, device: Device, problem: Problem, programs: int) -> Tile:
    """Return the tile with K split for about `programs` per multiprocessor, each with two blocks or more."""
    tiles = math.ceil(problem.N / tile.BN) * math.ceil(problem.M / tile.BM)
    wanted = programs * device.multiprocessors // tiles
    return _fitted(replace(tile, splits=max(1, min(wanted, problem.blocks // _MIN_BLOCKS_PER_SPLIT))), problem)


def registers_for(BM: int, warps: int, programs: int) -> int | None:
    """Return the registers a thread may have if `programs` are to be resident on a multiprocessor."""
    return min(255, _REGISTERS_PER_SM // (32 * warps * programs) // 8 * 8) if BM <= 16 else None


def shared_bytes(problem: Problem, BM: int, BN: int, buffers: int, chunk: int | None = None, arch: int = 90) -> int:
    """Return the most shared memory that a tile takes.

    Args:
        buffers: the pipeline's, one less than its stages.
        chunk: word columns per step; whole planes unless told.
        arch: on sm_90 tokens have one buffer more for the tensor cores to read from.
    """
    chunk = chunk or problem.plane
    low, *high = WIDTHS[problem.bits]
    words = BN * chunk * 2 * (problem.planes * low // 16 + len(high))
    tokens = problem.planes * chunk * BM * 2
    groups = 0 if problem.group_size >= problem.K else max(1, problem.planes * problem.plane // problem.group_size)
    scales = groups * BN * 4 * (1 if problem.symmetric else 2)  # one copy to scale sums, one to subtract zero points
    sums = BN * BM * 4  # turned around before they are stored, in the memory that the pipeline had
    return max(buffers * (words + tokens + scales) + (tokens if arch >= 90 and BM >= 16 else 0), sums)


def _resident(device: Device, shared: int) -> int:
    """Count the programs that fit into shared memory. The GPU keeps 1 KiB more for each, and has 1 KiB more."""
    return (device.shared_bytes + 1024) // (shared + 1024)


def _fitted(tile: Tile, problem: Problem) -> Tile:
    """Return the tile with a split that has counters and gives every program work, and a chunk within the plane."""
    tiles = math.ceil(problem.N / tile.BN) * math.ceil(problem.M / tile.BM)
    per_split = math.ceil(problem.blocks / (tile.splits if tiles <= COUNTERS else 1))
    return replace(tile, splits=math.ceil(problem.blocks / per_split), chunk=min(tile.chunk, problem.plane))


def _nearest(rows: Sequence[dict[str, Any]], problem: Problem) -> dict[str, Any] | None:
    """Return the row of the same kind with the nearest N and K, both within a factor of about two, or None."""
    bucket = bucket_of(problem.M)
    group = problem.group_size if problem.group_size < problem.K else -1
    kind = (problem.bits, group, problem.symmetric, problem.dtype, bucket)
    near = [row for row in rows if tuple(row[key] for key in ("bits", "group", "symmetric", "dtype", "M")) == kind]

    def distance(row: dict[str, Any]) -> float:
        return max(abs(math.log2(row["N"] / problem.N)), abs(math.log2(row["K"] / problem.K)))

    best = min(near, key=distance, default=None)
    return best if best is not None and distance(best) <= 1.25 else None


def bucket_of(M: int) -> int:
    """Return the number of tokens under which a table stores M."""
    return next((bucket for bucket in M_BUCKETS if bucket >= M), M_BUCKETS[-1])


def slug(name: str) -> str:
    """Turn the name of a GPU into a file name: 'NVIDIA H200' -> 'nvidia-h200'."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


@lru_cache(maxsize=4096)
def tile_for(device: Device, problem: Problem) -> Tile | None:
    """Return the tile for a problem on this machine. `forget_tables` makes it look into the tables again."""
    return choose(device, problem, tables_for(device.name, device.arch))


@cache
def tables_for(name: str, arch: int) -> tuple[dict[str, Any], ...]:
    """Return the tables for a GPU, best first: tuned here, shipped. Each must itself say that it is for this GPU."""
    mine = user_table(name)
    paths = (path for path in (mine, Path(__file__).parent / "tuned" / mine.name) if path.is_file())
    tables = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    made_for = {"gpu": name, "arch": arch, **versions()}
    return tuple(table for table in tables if made_for.items() <= table.items())


def forget_tables() -> None:
    """Forget what the tables said: one was written."""
    tables_for.cache_clear()
    tile_for.cache_clear()


def user_table(name: str) -> Path:
    """Return the path of the table that tuning writes."""
    return Path.home() / ".cache" / "llmq" / "tuned" / table_name(name)


def table_name(name: str) -> str:
    """Return the file name of a GPU's table. It holds what the speed of a tile depends on."""
    return f"{slug(name)}-triton{versions()['triton']}-{versions()['kernels']}.json"


@cache
def versions() -> dict[str, str]:
    """Return the version of Triton and a hash of the kernels that have tiles."""
    sources = (Path(__file__).with_name(stem + ".py").read_bytes() for stem in ("layout", "planes", "packed_matmul"))
    return {"triton": version("triton"), "kernels": hashlib.sha256(b"".join(sources)).hexdigest()[:8]}
