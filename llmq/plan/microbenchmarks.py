"""Times a little of each kind of work on this machine, with random numbers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from llmq.algorithms.output_matching import choose, matched
from llmq.algorithms.problem import Problem, round_to_nearest
from llmq.algorithms.stable_sums import energy, lost_energy
from llmq.calibration.block_runner import Block
from llmq.calibration.input_statistics import InputStatistics
from llmq.calibration.products import add_lower
from llmq.checkpoint.digests import digest
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import Grid
from llmq.core.timing import Clock
from llmq.run.block_quantizer import Run
from llmq.run.format_roundtrip import nearest, there_and_back

_TRIES, _ENOUGH_SECONDS = 5, 0.2  # work is timed five times, or until the times add up to this
_WEIGHTS = 1 << 20  # weights that are encoded and hashed once
_ROWS = (256, 768)  # of the problems timed; 256 rows are also what `choose` looks at in a larger problem
# A group of n columns takes about 3 n³ products, and 5 n² for each row (gptq, 2026-11-25). Twice that is the limit for
# b and d: more is noise, which would grow with n beyond all reason.
_MOST_PRODUCTS = (6, 10)


@dataclass(frozen=True)
class Speeds:
    """Seconds that each unit of work takes here."""

    product: float  # one multiplication of a large float32 matmul
    moment: float  # one multiplication of XᵀX, of which half the matrix is summed
    addition: float  # one number added to another in a large tensor
    solve: tuple[float, float, float, float]  # (a, b, c, d) of `solving`
    weight: float  # one weight of a linear: encoded, hashed, decoded and hashed again
    byte: float  # one byte of a tensor that is copied as it is: checked for NaN, and hashed twice

    def solving(self, rows: float, columns: int) -> float:
        """Return the seconds of solving a group: a n + b n³ + rows (c n + d n²), with n columns."""
        a, b, c, d = self.solve
        return columns * (a + b * columns**2 + rows * (c + d * columns))


def speeds_of(run: Run, widest: int, factors: torch.dtype) -> Speeds:
    """Time every kind of work, for linears of up to `widest` columns. `factors`: the dtype of matmuls in blocks."""
    drawn = torch.Generator().manual_seed(0)
    A, H = torch.randn(1024, 2048, generator=drawn).to(run.device), torch.zeros(256, 2048, device=run.device)
    X, whole = A[:, :1024].to(factors), torch.zeros(1024, 1024, device=run.device)
    plain, widths = A.to(run.scale_dtype), (512, 1024) if widest <= 2048 else (1024, 2048)
    weight = _some_weight(run)
    product = _seconds(lambda: H.addmm_(A[:, :256].T, A)) / (A.numel() * 256)
    return Speeds(
        product=product,
        moment=_seconds(lambda: add_lower(whole, X)) / (X.numel() * len(whole) / 2),
        addition=_seconds(lambda: A.add_(A)) / A.numel(),
        solve=_solve_factors(run, product, *widths),
        weight=_seconds(lambda: (digest(weight), digest(there_and_back(run, run.format, "linear", weight))))
        / weight.q.numel(),
        byte=_seconds(lambda: (torch.isfinite(plain).all(), digest(plain), digest(plain))) / plain.nbytes,
    )


def token_seconds(block: Block) -> float:
    """Return the seconds that a token takes to pass the block."""
    hidden = block.hidden[0]
    with block.many_runs():
        return _seconds(lambda: block.run(hidden)) / hidden.shape[:2].numel()


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest of a few times: other programs may slow down the rest."""
    times: list[float] = []
    while len(times) < _TRIES and sum(times) < _ENOUGH_SECONDS:
        clock = Clock()
        with clock("work"):
            work()
        times.append(clock.seconds["work"])
    return min(times)


def _solve_factors(run: Run, product: float, narrow: int, wide: int) -> tuple[float, float, float, float]:
    """Fit (a, b, c, d) to the seconds that a group of n columns takes: a n + b n³ + rows (c n + d n²).

    b n³ is the factorisation of H, d n² the products of a row with H and its factor; a n and c n is what is done once
    for each column. Four unknowns need four times: two row counts at each of two widths.

    1. At each width, two row counts give a line: `fixed` seconds, and seconds `per_row`.
    2. Over the two widths, fixed / n = a + b n² and per_row / n = c + d n; each pair of times gives two factors.
    """
    _fixed_and_per_row(run, _ROWS[0])  # warms up: the first run is the slowest
    fixed_wide, per_row_wide = _fixed_and_per_row(run, wide)
    if not run.algorithm.needs_statistics(run.config):  # no H: each weight is rounded alone, so b = d = 0
        return fixed_wide / wide, 0.0, per_row_wide / wide, 0.0
    fixed, per_row = _fixed_and_per_row(run, narrow)
    most_b, most_d = (product * times * (2 if run.config.effort == "best" else 1) for times in _MOST_PRODUCTS)
    b = min(most_b, max(0.0, (fixed_wide / wide - fixed / narrow) / (wide**2 - narrow**2)))
    d = min(most_d, max(0.0, (per_row_wide / wide - per_row / narrow) / (wide - narrow)))
    return max(0.0, fixed_wide / wide - b * wide**2), b, max(0.0, per_row_wide / wide - d * wide), d


def _fixed_and_per_row(run: Run, columns: int) -> tuple[float, float]:
    """Time problems of two row counts and return (seconds without rows, seconds of each row)."""
    size = min(columns, run.grid.on(columns).group_size)  # columns are rounded down to a multiple of it
    grid = replace(run.grid, group_size=size)
    problems = [_random_problem(run, rows, columns // size * size, grid) for rows in _ROWS]
    few, many = (_seconds(partial(_solve, run, problem)) for problem in problems)
    per_row = max(0.0, many - few) / (_ROWS[1] - _ROWS[0])
    return max(0.0, few - per_row * _ROWS[0]), per_row


def _random_problem(run: Run, rows: int, columns: int, grid: Grid) -> Problem:
    drawn = torch.Generator().manual_seed(0)
    W, statistics = torch.randn(rows, columns, generator=drawn).to(run.device), None
    if run.algorithm.needs_statistics(run.config):
        X = torch.randn(columns, columns, generator=drawn).to(run.device)
        H = (X + X.T).mul_(0.2 / columns**0.5)
        H.diagonal().add_(1.0)  # its eigenvalues are positive
        ones, target_moment = torch.ones(columns, device=run.device), W.flip(0) if run.matching else None
        statistics = InputStatistics(H, H, columns, 0, target_moment, target_moment, ones)
    return Problem(W, statistics, grid, run.scale_dtype, torch.ones(rows, dtype=torch.bool, device=run.device))


def _solve(run: Run, problem: Problem) -> None:
    """Do all that is done to a group of linears once its statistics are there."""
    problem = replace(problem, W=matched(problem, choose(problem)))
    H = None if problem.statistics is None else problem.statistics.H
    solution = run.algorithm.solve(problem, run.config)
    lost_energy(problem, solution, H)
    if not run.algorithm.is_nearest(run.config):
        lost_energy(problem, round_to_nearest(problem), H)
    energy(problem.W, H)
    solution.dequantize(problem.grid.group_size)


def _some_weight(run: Run) -> QuantizedWeight:
    columns = 1024 if run.grid.group_size == -1 else 32 * run.grid.group_size
    rows = max(32, _WEIGHTS // columns // 32 * 32)
    return nearest(run, torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), run.config.bits)
