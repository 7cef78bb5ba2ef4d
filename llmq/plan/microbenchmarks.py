"""How long each unit of work takes here: a moment of each, on random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from llmq.algorithms.output_matching import choose, matched
from llmq.algorithms.problem import Problem, energy, lost_energy, round_to_nearest
from llmq.calibration.block_runner import Block
from llmq.calibration.input_statistics import InputStatistics
from llmq.checkpoint.digests import digest
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import Grid
from llmq.core.timing import Clock
from llmq.run.block_quantizer import Run
from llmq.run.format_roundtrip import nearest, there_and_back

_TRIES, _LONG = 5, 0.2  # of work that is timed; seconds after which it is not tried again
_WEIGHTS = 1 << 20  # that are written and read once
# A group of n columns takes some 3 n³ products, and 5 n² for each row (gptq, 2026-11-25); more than this is noise.
_PRODUCTS = (6, 10)
_ROWS = (256, 768)  # of problems that are timed: 256 rows choose for all in any case


@dataclass(frozen=True)
class Speeds:
    """Seconds that each unit of work takes here."""

    product: float
    """A multiplication in float32 among many."""
    number: float
    """Added to another in a large sum."""
    solve: tuple[float, float, float, float]
    """A group of n columns takes a·n + b·n³, and for each row c·n + d·n²."""
    weight: float
    """Of a linear, to be encoded, hashed, decoded and hashed again."""
    byte: float
    """Of a tensor that is copied as it is: looked at, and hashed twice."""

    def solving(self, rows: float, columns: int) -> float:
        a, b, c, d = self.solve
        return columns * (a + b * columns**2 + rows * (c + d * columns))


def speeds_of(run: Run, widest: int) -> Speeds:
    """Time every kind of work for a moment. `widest`: columns of the widest linear."""
    drawn = torch.Generator().manual_seed(0)
    A, H = torch.randn(1024, 2048, generator=drawn).to(run.device), torch.zeros(256, 2048, device=run.device)
    plain = A.to(run.scale_dtype)
    weight = _some_weight(run)
    product = _seconds(lambda: H.addmm_(A[:, :256].T, A)) / (A.numel() * 256)
    return Speeds(
        product=product,
        number=_seconds(lambda: A.add_(A)) / A.numel(),
        solve=_solve_seconds(run, product, *((512, 1024) if widest <= 2048 else (1024, 2048))),
        weight=_seconds(lambda: (digest(weight), digest(there_and_back(run, "linear", weight)))) / weight.q.numel(),
        byte=_seconds(lambda: (torch.isfinite(plain).all(), digest(plain), digest(plain))) / plain.nbytes,
    )


def token_seconds(block: Block) -> float:
    """Of each token that goes through the block."""
    hidden = block.hidden[0]
    with block.many_runs():
        return _seconds(lambda: block.run(hidden)) / hidden.shape[:2].numel()


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few tries, of one if that took long: others may be at work on the machine."""
    found: list[float] = []
    while len(found) < _TRIES and sum(found) < _LONG:
        clock = Clock()
        with clock("work"):
            work()
        found.append(clock.seconds["work"])
    return min(found)


def _solve_seconds(run: Run, product: float, narrow: int, wide: int) -> tuple[float, float, float, float]:
    """Factors of n, n³, and for each row of n and n², for groups of n columns: see Speeds."""
    _line(run, _ROWS[0])  # the first time is the slowest
    whole_wide, row_wide = _line(run, wide)
    if not run.algorithm.needs_statistics(run.config):  # every weight by itself
        return whole_wide / wide, 0.0, row_wide / wide, 0.0
    whole, row = _line(run, narrow)
    # What other programs add to one of them would grow with the columns beyond all reason.
    most = tuple(product * times * (2 if run.config.effort == "best" else 1) for times in _PRODUCTS)
    b = min(most[0], max(0.0, (whole_wide / wide - whole / narrow) / (wide**2 - narrow**2)))
    d = min(most[1], max(0.0, (row_wide / wide - row / narrow) / (wide - narrow)))
    return max(0.0, whole_wide / wide - b * wide**2), b, max(0.0, row_wide / wide - d * wide), d


def _line(run: Run, columns: int) -> tuple[float, float]:
    """Seconds of a problem of about so many columns, as (whole, each row)."""
    size = min(columns, run.grid.on(columns).group_size)
    grid = replace(run.grid, group_size=size)
    problems = [_posed(run, rows, columns // size * size, grid) for rows in _ROWS]
    less, more = (_seconds(partial(_solve, run, problem)) for problem in problems)
    row = max(0.0, more - less) / (_ROWS[1] - _ROWS[0])
    return max(0.0, less - row * _ROWS[0]), row


def _posed(run: Run, rows: int, columns: int, grid: Grid) -> Problem:
    drawn = torch.Generator().manual_seed(0)
    W, statistics = torch.randn(rows, columns, generator=drawn).to(run.device), None
    if run.algorithm.needs_statistics(run.config):
        X = torch.randn(columns, columns, generator=drawn).to(run.device)
        H = (X + X.T).mul_(0.2 / columns**0.5)
        H.diagonal().add_(1.0)  # its eigenvalues are positive
        ones, target_moment = torch.ones(columns, device=run.device), W.flip(0) if run.matching else None
        statistics = InputStatistics(H, H, ones, columns, 0, target_moment, target_moment)
    clippable = torch.ones(rows, dtype=torch.bool, device=run.device)
    return Problem(W, statistics, grid, run.scale_dtype, clippable)


def _solve(run: Run, problem: Problem) -> None:
    """What is done to a group of linears once its statistics are there."""
    problem = replace(problem, W=matched(problem, choose(problem)))
    H = None if problem.statistics is None else problem.statistics.H
    solution = run.algorithm.solve(problem, run.config)
    for each in (solution,) if run.algorithm.is_nearest(run.config) else (solution, round_to_nearest(problem)):
        lost_energy(problem, each, H)
    energy(problem.W, H)
    solution.dequantize(problem.grid.group_size)


def _some_weight(run: Run) -> QuantizedWeight:
    size = run.grid.group_size
    columns = 1024 if size == -1 else 32 * size
    rows = max(32, _WEIGHTS // columns // 32 * 32)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return nearest(run, W, run.config.bits)
