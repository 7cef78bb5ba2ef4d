"""Find the fastest tile of each problem, and write the table that `choose` reads.

What runs and times a tile is handed in (`trial.Trial` on a GPU), so that everything here is tested without one.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from llmq_kernels.choose import (
    Device,
    Problem,
    Tile,
    bucket_of,
    forget_tables,
    registers_for,
    rule,
    shared_bytes,
    split,
    versions,
)

TimeOf = Callable[[Problem, "Tile | None"], float]

_MOST = 20
_WARPS_PER_SM = 16  # that registers are kept for: 128 each
_WITH_PDL = 6
"""The first tiles, which are also tried with programmatic dependent launch."""
_FIELDS = ("bits", "group", "symmetric", "dtype", "M", "N", "K", "tile", "us")


class Family(NamedTuple):
    """Tiles that differ only in their splits of K."""

    BN: int
    warps: int
    stages: int
    chunk: int
    fold: bool
    loads: tuple[int, ...]
    """Programs per multiprocessor to split K for."""


# By BM. At 4 bit, groups of 128, float16 and bfloat16 (triton 3.6.0 and 3.7.1), all of these compile for sm_90 without
# serialized wgmma, and, but for 12 bytes in one of them, without spills. Taller and wider ones, BM=128 BN=128 with 4
# warps, BM=128 BN=256 and BM=256, spill up to 960 bytes.
_FAMILIES = {
    8: (
        Family(64, 4, 3, 64, False, (2, 4, 8)),
        Family(64, 4, 4, 64, False, (2, 4, 8)),
        Family(128, 8, 3, 64, False, (1, 2, 4)),
        Family(128, 4, 3, 64, False, (2, 4)),
        Family(32, 2, 4, 64, False, (4, 8)),
    ),
    16: (
        Family(64, 4, 3, 64, False, (2, 4, 8)),
        Family(64, 4, 4, 64, False, (2, 4, 8)),
        Family(128, 4, 3, 32, False, (1, 2, 4)),
        Family(128, 8, 3, 64, False, (1, 2, 4)),
    ),
    32: (
        Family(64, 4, 3, 64, False, (1, 2, 4)),
        Family(64, 4, 4, 32, False, (1, 2, 4)),
        Family(128, 8, 3, 64, False, (1, 2, 4)),
        Family(128, 4, 3, 32, False, (1, 2, 4)),
    ),
    64: (
        Family(64, 4, 3, 32, False, (1, 2, 4)),
        Family(64, 4, 3, 32, True, (1, 2)),
        Family(128, 8, 3, 64, False, (1, 2)),
        Family(128, 8, 3, 32, False, (1, 2)),
        Family(128, 8, 3, 32, True, (1, 2)),
        Family(128, 4, 3, 32, True, (1, 2)),
        Family(256, 8, 3, 32, True, (1, 2)),
    ),
    128: (
        Family(128, 8, 3, 32, True, (1, 2)),
        Family(128, 8, 4, 32, True, (1, 2)),
        Family(128, 8, 3, 16, True, (1, 2)),
        Family(64, 4, 3, 32, True, (1, 2)),
    ),
}


def candidates(device: Device, problem: Problem) -> list[Tile | None]:
    """Return up to 20 tiles to time, the rule's own first. None stands for dequantizing first."""
    tiles = list(dict.fromkeys([rule(device, problem), *_of_families(device, problem)]))
    if device.arch == 90 and problem.M <= 32:  # where the start of a launch is a good part of it
        split = [tile for tile in tiles if tile is not None][:_WITH_PDL]
        tiles = [*split, *(replace(tile, pdl=True) for tile in split), *tiles[_WITH_PDL:]]
    if problem.M >= 64 and None not in tiles:
        tiles.insert(1, None)
    return tiles[:_MOST]


def _of_families(device: Device, problem: Problem) -> Iterator[Tile]:
    heights = [next(BM for BM in _FAMILIES if min(problem.M, 64) <= BM)]
    if problem.M > 64:
        heights.insert(0, 128)
    for BM in heights:
        for family in _FAMILIES[BM]:
            if problem.M > 64 and family.BN == 64 and not family.fold:
                continue  # every few rows would read all the tokens again
            chunk = min(family.chunk, problem.plane)
            while chunk > 16 and not _fits(device, problem, BM, family, chunk):
                chunk //= 2
            if _fits(device, problem, BM, family, chunk):
                for load in family.loads:
                    registers = registers_for(BM, family.warps, min(load, _WARPS_PER_SM // family.warps))
                    sizes = BM, family.BN, family.warps, family.stages
                    tile = Tile(*sizes, chunk=chunk, fold=family.fold, registers=registers)
                    yield split(tile, device, problem, load)


def _fits(device: Device, problem: Problem, BM: int, family: Family, chunk: int) -> bool:
    shared = shared_bytes(problem, BM, family.BN, family.stages - 1, chunk, device.arch)
    return shared <= device.shared_bytes


def tune(
    device: Device,
    problems: Iterable[Problem],
    time_of: TimeOf,
    enough: Callable[[], bool] = lambda: False,
    most: int = _MOST,
) -> list[dict[str, Any]]:
    """Return the fastest tile of each problem, as rows of a table.

    Args:
        time_of: seconds a tile takes; it may raise any error if a tile does not compile, run or compute the same.
        enough: asked before each problem; once it returns True, the other problems are left out.
        most: tiles to try for a problem.

    A row also tells what the rule's tile takes (`rule_us`), what was `tried`, and what was `skipped` and why.
    Raises RuntimeError if not one tile works for a problem: then something else is wrong.
    """
    rows = []
    for problem in problems:
        if enough():
            break
        rows.append(_best(candidates(device, problem)[:most], problem, time_of))
    return rows


def _best(tiles: Sequence[Tile | None], problem: Problem, time_of: TimeOf) -> dict[str, Any]:
    took: dict[Tile | None, float] = {}
    skipped = []
    for tile in tiles:
        try:
            took[tile] = round(1e6 * time_of(problem, tile), 3)
        except Exception as error:  # the compiler, the driver and the check each fail in their own way
            skipped.append({"tile": _plain(tile), "why": f"{type(error).__name__}: {error}"[:200]})
    if not took:
        raise RuntimeError(f"no tile works for {problem}: {skipped[0]['why']}")
    best = min(took, key=lambda tile: took[tile])
    return {
        "bits": problem.bits,
        "group": problem.group_size if problem.group_size < problem.K else -1,
        "symmetric": problem.symmetric,
        "dtype": problem.dtype,
        "M": bucket_of(problem.M),
        "N": problem.N,
        "K": problem.K,
        "tile": _plain(best),
        "us": took[best],
        "rule_us": took.get(tiles[0]),
        "tried": [{"tile": _plain(tile), "us": us} for tile, us in took.items()],
        "skipped": skipped,
    }


def _plain(tile: Tile | None) -> dict[str, Any] | None:
    return None if tile is None else asdict(tile)


def merged(path: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table at `path`, if it exists, with these in place of those for the same problems."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return list({tuple(row[key] for key in _FIELDS[:7]): row for row in [*old, *rows]}.values())
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not a table: it will be replaced
        return list(rows)


def write_table(path: Path, device: Device, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table for `choose.tables_for`: the whole file or nothing. Later calls in this process use it."""
    head = {"gpu": device.name, "arch": device.arch, **versions(), "date": datetime.date.today().isoformat()}
    lines = ",\n".join(json.dumps({key: row[key] for key in _FIELDS}) for row in rows)  # one line each, for diffs
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    forget_tables()
