"""Time the first calls of kernels, with an empty and with a filled Triton cache. Also compile kernels in parallel."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llmq_kernels import new_counters
from llmq_kernels.choose import Problem, Tile, rule
from llmq_kernels.layout import WIDTHS, PackedWeight, block_of, plane_of
from llmq_kernels.trial import multiply
from triton import knobs

from bench import pool
from bench.machine import the_machine
from bench.session import Session, Task

Call = tuple[Problem, "Tile | None"]
_LONGEST = 30  # seconds; a first call that takes longer tells enough by that


class Job(NamedTuple):
    """Calls that one process makes, each once."""

    toy: bool
    cache: str | None
    """Cache directory for Triton; None for the usual one."""
    calls: tuple[Call, ...]


def launch(job: Job) -> list[tuple[float, str | None]]:
    """Make each call and return (seconds, error or None) for it."""
    if job.cache:
        os.environ["TRITON_CACHE_DIR"] = job.cache
    machine = the_machine(job.toy)
    torch.zeros(1, device=machine.where)  # creates the GPU context before the clock starts
    outcomes = []
    for problem, tile in job.calls:
        x = torch.zeros(problem.M, problem.K, dtype=getattr(torch, problem.dtype), device=machine.where)
        weight = _empty_weight(problem, machine.where)
        counters = new_counters(machine.where)
        machine.synchronize()
        start, wrong = time.perf_counter(), None
        try:
            multiply(x, weight, tile, counters)
            machine.synchronize()
        except Exception as error:  # for example an impossible tile; the caller decides what it means
            wrong = f"{type(error).__name__}: {error}"[:200]
        outcomes.append((time.perf_counter() - start, wrong))
    return outcomes


def _empty_weight(problem: Problem, where: torch.device) -> PackedWeight:
    padded = problem.blocks * block_of(problem.bits, plane_of(problem.group_size, problem.K))
    words = (torch.zeros(problem.N, padded * w // 16, dtype=torch.int16, device=where) for w in WIDTHS[problem.bits])
    grid = torch.zeros(problem.K // problem.group_size, problem.N, dtype=torch.int32, device=where)
    return PackedWeight(tuple(words), grid, problem.bits, problem.group_size, problem.K, problem.symmetric)


def tasks(session: Session) -> Iterator[Task]:
    """Yield one task that times the first calls of the layers of a model, with the rule's tiles."""
    yield Task("compile", ("rule",), lambda: _cold_start(session), seconds=20)


def _cold_start(session: Session) -> dict[str, Any]:
    plan, machine = session.plan, session.machine
    tokens = sorted({*plan.first, *plan.later}, key=lambda M: (M > 256, M))
    problems = [
        Problem(4, plan.group, True, plan.dtype, M, N, K) for N, K in plan.shapes[:3] for M in tokens if M <= 512
    ]
    calls = _once_each([(problem, rule(machine.device, problem)) for problem in problems])
    usual = knobs.cache.dir
    with tempfile.TemporaryDirectory() as cache:
        # A toy run uses one process too, so that it tries this code.
        workers = machine.workers or 1
        jobs = [Job(machine.toy, cache, tuple(calls[i::workers])) for i in range(min(workers, len(calls)))]
        start, limit = time.perf_counter(), min(_LONGEST, session.left())
        results = list(pool.run(launch, jobs, workers, limit))
        outcomes = [outcome for _, result in results for outcome in _checked(result)]
        wall = time.perf_counter() - start
        binaries = len(list(Path(cache).rglob("*.cubin")))
        again = Job(machine.toy, None if machine.toy else cache, tuple(calls))
        shutil.copytree(cache, usual, dirs_exist_ok=True)  # what is timed later need not compile again
        ((_, warm),) = pool.run(launch, [again], min(1, machine.workers), limit)
    wrong = [what for _, what in outcomes if what]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of the rule's tiles do not run, for example: {wrong[0]}")
    return {
        "binaries": binaries,
        "workers": workers,
        "cold_wall": round(wall, 2),
        "cold_in_all": round(sum(seconds for seconds, _ in outcomes), 2),
        "cold_slowest": round(max(seconds for seconds, _ in outcomes), 2),
        "warm_in_all": round(sum(seconds for seconds, _ in _checked(warm)), 2),
    }


def _checked(result: Any) -> list[tuple[float, str | None]]:
    if isinstance(result, Exception):
        raise result
    return result


def ahead(session: Session, calls: Sequence[Call], seconds: float) -> None:
    """Compile calls into Triton's cache with many processes, so that later calls do not wait for the compiler."""
    machine, calls = session.machine, _once_each(calls)
    if machine.workers == 0 or not calls:
        return
    jobs = [Job(machine.toy, None, tuple(calls[i :: machine.workers])) for i in range(machine.workers)]
    start = time.perf_counter()
    results = list(pool.run(launch, [job for job in jobs if job.calls], machine.workers, seconds))
    late = sum(isinstance(result, Exception) for _, result in results)
    took = time.perf_counter() - start
    session.say(
        f"compiled {len(calls)} kernels in {took:.1f}s" + (f"; {late} processes did not finish" if late else "")
    )


def _once_each(calls: Iterable[Call]) -> list[Call]:
    """Return one call for each different binary. Triton compiles anew if a size becomes 1 or a multiple of 16."""
    kinds: dict[Any, Call] = {}
    for problem, tile in calls:
        kind = (problem.bits, problem.group_size, problem.symmetric, problem.dtype)
        sizes = [(size == 1, size % 16 == 0) for size in (problem.N, problem.K)]
        even = problem.K % block_of(problem.bits, problem.plane) == 0
        shape = tile and replace(tile, splits=min(2, tile.splits))  # all numbers of splits above 1 use one binary
        kinds.setdefault((*kind, *sizes, even, shape), (problem, tile))
    return list(kinds.values())
