"""Check the results of the kernels before timing them: every width, group and dtype against float64.

New memory is filled with NaN first, so that a result that nobody wrote is noticed.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from llmq_kernels import dequantize_matmul, new_counters, packed_matmul
from llmq_kernels.choose import Problem, Tile, rule
from llmq_kernels.layout import PackedWeight, pack
from llmq_kernels.trial import multiply, random_codes, random_tokens
from llmq_kernels.tune import candidates
from torch import Tensor

from bench import pool
from bench.bars import ONE_ROUNDING, TWO_ROUNDINGS
from bench.machine import Machine, the_machine
from bench.plan import FULL, TOY
from bench.session import Session, Task

RUNS = 3
_SHOWN = 5


class Job(NamedTuple):
    toy: bool
    bits: int
    group: int
    dtype: str
    symmetric: bool


def tasks(session: Session, first: bool = False) -> Iterator[Task]:
    """Yield one task that runs all jobs in parallel; with `first` only those of the plan's main width and group."""
    yield Task("correct", None, lambda: _check_all(session, first), seconds=10)


def _check_all(session: Session, first: bool) -> None:
    grid, machine, main = session.plan.grid, session.machine, (4, session.plan.group)
    kinds = itertools.product(grid.bits, grid.groups, grid.dtypes, (True, False))
    jobs = [Job(machine.toy, *kind) for kind in kinds if not first or kind[:2] == main]
    jobs = [job for job in jobs if not session.results.has("correct", job[1:])]
    for job, outcome in pool.run(check, jobs, machine.workers, session.left()):
        if isinstance(outcome, TimeoutError):
            session.late.append(" ".join(map(str, ["correct", *job[1:]])))
            continue
        if isinstance(outcome, Exception):
            outcome = {"failed": f"{type(outcome).__name__}: {outcome}"[:300]}
        session.results.add("correct", job[1:], outcome)
        wrong = [outcome["failed"]] if "failed" in outcome else outcome["wrong"]
        for what in wrong[:_SHOWN]:
            session.fail(f"{job.bits} bit, group {job.group}, {job.dtype}: {what}")
    rows = session.results.of("correct")
    session.say(f"checked {sum(row['cases'] for row in rows)} cases")


def check(job: Job) -> dict[str, Any]:
    """Check one kind of weight. Returns the number of cases, the largest errors, and a list of all mistakes."""
    machine, grid = the_machine(job.toy), (TOY if job.toy else FULL).grid
    group = job.group
    K = grid.inputs | 1 if group == -1 else group * max(1, grid.inputs // group - 1 + grid.inputs // group % 2)
    row: dict[str, Any] = {"cases": 0, "error": 0.0, "largest": 0.0, "twin_equal": 0, "twins": 0, "wrong": []}
    row["skipped"] = []
    with _poisoned_memory():
        for N, K_, tokens in ((grid.outputs, K, grid.tokens), (*grid.even, grid.tokens[:1])):
            size = K_ if group == -1 else group
            problem = Problem(job.bits, size, job.symmetric, job.dtype, 1, N, K_)
            try:
                _check_weight(machine, problem, tokens, row, twins=grid.outputs == N)
            except Exception as error:  # after a launch that breaks the GPU context, all later checks fail too
                row["wrong"].append(f"{_short(problem)}: {type(error).__name__}: {error}"[:300])
    return row


def _check_weight(
    machine: Machine, problem: Problem, tokens: tuple[int, ...], row: dict[str, Any], twins: bool
) -> None:
    codes, scale, zero = random_codes(problem, machine.where)
    weight = pack(codes, scale, zero, problem.bits)
    exact = exact_weight(codes, scale, zero)
    for M in tokens:
        problem = replace(problem, M=M)
        x = random_tokens(problem, machine.where, seed=M)
        for tile, ours in _tiles(machine, problem):
            try:
                y = _repeated(x, weight, tile)
            except AssertionError as error:
                row["wrong"].append(f"{_short(problem)} {tile}: {error}")
                continue
            except Exception as error:
                # A tile that the rule would not choose may be too large for this GPU. If the GPU itself is broken,
                # synchronize raises.
                machine.synchronize()
                row["wrong" if ours else "skipped"].append(
                    f"{_short(problem)} {tile}: {type(error).__name__}: {error}"[:300]
                )
                continue
            _compare(y, x, exact, problem, tile, row)
    if twins:
        _compare_twins(weight, replace(problem, M=tokens[0]), machine, row)


def _tiles(machine: Machine, problem: Problem) -> Iterator[tuple[Tile | None, bool]]:
    """Yield (tile, whether the rule may choose it).

    The tiles are the rule's own, the same with dependent launch, and one that folds the scales into the weights.
    """
    chosen = rule(machine.device, problem)
    yield chosen, True
    if problem.M == 1 and problem.bits == 4 and machine.device.arch == 90 and chosen is not None:
        yield replace(chosen, pdl=True), True
    if 64 <= problem.M <= 256:
        yield next((t for t in candidates(machine.device, problem) if t is not None and t.fold), None), False


def _repeated(x: Tensor, weight: PackedWeight, tile: Tile | None) -> Tensor:
    """Multiply several times and return the product. Raises AssertionError if the runs give different bits."""
    counters = new_counters(x.device)
    runs = []
    for _ in range(RUNS):
        y = torch.full((len(x), weight.out_features), float("nan"), dtype=x.dtype, device=x.device)
        runs.append(multiply(x, weight, tile, counters, y))
    assert not counters.any(), "the counters are not zero after the runs"
    assert all(torch.equal(runs[0].view(torch.int16), y.view(torch.int16)) for y in runs), (
        f"{RUNS} runs gave different bits"
    )
    return runs[0]


def exact_weight(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return scale * (code - zero) in float64, as [N, K]."""
    grouped = codes.double().unflatten(1, (scale.shape[1], -1))
    return ((grouped - zero.double()[..., None]) * scale.double()[..., None]).flatten(1)


def errors(y: Tensor, x: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return (relative Frobenius error, largest error divided by the largest value)."""
    expected = x.double() @ exact.T
    difference = y.double() - expected
    return float(difference.norm() / expected.norm()), float(difference.abs().max() / expected.abs().max())


def bar_of(tile: Tile | None, dtype: str) -> float:
    return (TWO_ROUNDINGS if tile is None or tile.fold else ONE_ROUNDING)[dtype]


def _compare(y: Tensor, x: Tensor, exact: Tensor, problem: Problem, tile: Tile | None, row: dict[str, Any]) -> None:
    error, largest = errors(y, x, exact)
    bar = bar_of(tile, problem.dtype)
    row["cases"] += 1
    row["error"], row["largest"] = max(row["error"], error), max(row["largest"], largest)
    if not (error <= bar and largest <= 4 * bar):  # written so that NaN fails too
        row["wrong"].append(f"{_short(problem)} {tile}: error {error:.2e}, largest {largest:.2e}, bar {bar:.1e}")


def _compare_twins(weight: PackedWeight, problem: Problem, machine: Machine, row: dict[str, Any]) -> None:
    """Compare the kernels with inline PTX with their twins in plain Triton.

    Dequantized weights must be equal. Products may differ by rounding, because sums may have another order.
    """
    dtype, tile = getattr(torch, problem.dtype), rule(machine.device, problem)
    x = random_tokens(problem, machine.where)
    rows = min(64, weight.out_features)
    results = []
    for uses_asm in (packed_matmul.uses_asm, lambda _: False):
        with (
            mock.patch.object(packed_matmul, "uses_asm", uses_asm),
            mock.patch.object(dequantize_matmul, "uses_asm", uses_asm),
        ):
            W = torch.full((rows, weight.in_features), float("nan"), dtype=dtype, device=machine.where)
            dequantize_matmul.dequantize_rows(weight, W, 0)
            results.append((W, _repeated(x, weight, tile)))
    (W, y), (twin_W, twin_y) = results
    row["twins"] += 1
    row["twin_equal"] += int(torch.equal(y.view(torch.int16), twin_y.view(torch.int16)))
    if not torch.equal(W.view(torch.int16), twin_W.view(torch.int16)):
        row["wrong"].append(f"{_short(problem)}: PTX and its twin dequantize differently")
    if not (y.double() - twin_y.double()).norm() <= bar_of(tile, problem.dtype) * y.double().norm():
        row["wrong"].append(f"{_short(problem)} {tile}: PTX and its twin multiply differently")


def _short(problem: Problem) -> str:
    return f"{'sym' if problem.symmetric else 'asym'} M={problem.M} N={problem.N} K={problem.K}"


@contextmanager
def _poisoned_memory() -> Generator[None]:
    """Let torch.empty return NaN while the context is open, so that no kernel can rely on old contents of memory."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # this setting fills new memory with NaN
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
