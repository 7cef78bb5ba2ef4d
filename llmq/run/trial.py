"""Rounds one unit of a block, as the run would, and lets the layers after it in the block make up for it.

The block has its original weights before and after.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor, nn

from llmq.algorithms.output_matching import choose, matched
from llmq.calibration.block_runner import Block
from llmq.calibration.input_statistics import InputStatistics, collect_statistics
from llmq.core.distributed import ALONE
from llmq.models.block_structure import Group, linear_of
from llmq.models.packable import are_fused
from llmq.run.block_quantizer import Run
from llmq.run.expert_groups import statistics_of_experts
from llmq.run.layer_problem import make_problem, packable_groups, pad, solve_alone, weights_of


def units_of(run: Run, block: Block) -> list[list[Group]]:
    """Return the groups of each unit of a block."""
    return units_among(packable_groups(block, run.source, run.bits)[0])


def units_among(groups: Iterable[Group]) -> list[list[Group]]:
    """Put groups together that must have the same bits: all experts of a module; what engines fuse."""
    units = list[list[Group]]()
    for group in groups:
        unit = next((unit for unit in units if _belong_together(unit[0], group)), None)
        if unit is None:
            units.append([group])
        else:
            unit.append(group)
    return units


def _belong_together(one: Group, other: Group) -> bool:
    if one.expert is not None and other.expert is not None:
        return one.expert.module == other.expert.module
    return one.calls != 1 and other.calls != 1 and are_fused(one.linears[0], other.linears[0])


@contextmanager
def rounded_alone(run: Run, block: Block, unit: list[Group], units: list[list[Group]], bits: int) -> Generator[None]:
    """Round the linears of a unit to so many bits while inside. `units`: all of the block, in their order."""
    later = [group for (group, *_) in units[units.index(unit) + 1 :] if group.expert is None and group.calls == 1]
    with _original_weights_after(block):
        trial = replace(block, original=block.hidden, _replaced={})
        for name, W in _rounded(run, block, unit, bits):
            trial.replace_weight(name, W)
        trial.expect([[group] for group in later])
        for group in later if run.matching else ():
            _make_up(run, trial, group)
        yield


@contextmanager
def _original_weights_after(block: Block) -> Generator[None]:
    """Give the linears of a block their weights back at the end."""
    linears = [module for module in block.module.modules() if isinstance(module, nn.Linear)]
    own = [linear.weight.data for linear in linears]
    try:
        yield
    finally:
        for linear, weight in zip(linears, own, strict=True):
            linear.weight.data = weight


def _rounded(run: Run, block: Block, unit: list[Group], bits: int) -> Iterator[tuple[str, Tensor]]:
    """Yield the rounded weights of the linears of a unit, by name in the block. Each group is solved as in the run."""
    for group, statistics in _statistics(run, block, unit):
        grid = replace(run.grid, bits=bits)
        if group.calls != 1:
            solution, _ = solve_alone(block, group, grid, run.scale_dtype, ALONE)
        else:
            with run.clock("solve"):
                problem = make_problem(block, group, statistics, grid, run.scale_dtype)
                solution = run.algorithm.solve(pad(problem), replace(run.config, effort="normal"))
                solution = solution.rows(0, len(problem.W))
        for name, weight in weights_of(block, group, solution, bits).items():
            yield name, weight.dequantize()


def _statistics(run: Run, block: Block, unit: list[Group]) -> Iterator[tuple[Group, InputStatistics | None]]:
    if unit[0].expert is not None:
        yield from statistics_of_experts(block, unit, run.config, run.clock, last=False)
    elif unit[0].calls != 1:
        yield from ((group, None) for group in unit)
    else:
        yield unit[0], collect_statistics(block, unit, run.clock, last=False)[0]


def _make_up(run: Run, trial: Block, group: Group) -> None:
    """Move the weights of a group so that its outputs come closer to the original's; see output_matching.py."""
    (statistics,) = collect_statistics(trial, [group], run.clock, last=False)
    with run.clock("solve"):
        problem = make_problem(trial, group, statistics, run.grid, run.scale_dtype)
        padded = pad(problem)
        W = matched(padded, choose(padded))[: len(problem.W)]
        rows = [linear_of(trial.module, name).out_features for name in group.linears]
        for name, of_linear in zip(group.linears, W.split(rows), strict=True):
            trial.replace_weight(name, of_linear)
