"""Builds the rounding problem of a group of linears, solves it with all processes, and measures the error."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import fsum

import torch
from torch import Tensor

from llmq.algorithms import Algorithm
from llmq.algorithms.output_matching import Match, matched
from llmq.algorithms.problem import ROW_MULTIPLE, Problem, Solution, round_to_nearest
from llmq.algorithms.stable_sums import energy, lost_energy
from llmq.calibration.block_runner import Block
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.config import QuantizeConfig
from llmq.core.device import numbers
from llmq.core.distributed import Ranks
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import Grid
from llmq.models.block_structure import Group, find_groups, linear_of
from llmq.models.model_source import ModelSource
from llmq.models.packable import inside, split_packable
from llmq.run.journal import Line
from llmq.run.layer_bits import bits_in

# Queries and keys meet in a dot product, where a clipped outlier costs more than its own error says (as in AWQ).
_NOT_CLIPPED = ("q_proj", "k_proj", "qkv_proj")


@dataclass
class Solved:
    """A group of linears with rounded weights."""

    group: Group
    solution: Solution
    entry: Line  # of the report
    problem: Problem | None  # kept only for a method that refines the solutions


def packable_groups(block: Block, source: ModelSource, bits: dict[str, int]) -> tuple[list[Group], dict[str, str]]:
    """Run a block once. Return its groups of linears that can be packed, and why the other linears stay in float.

    `bits`: of each linear, by its name in the model.
    """
    assert block.sample is not None
    found = find_groups(block.module, block.run, block.sample)
    return split_packable(block.module, found, bits_in(block.name, bits), inside(block.name, source.shared_names))


def stages_of(groups: Sequence[Group], sequential: bool) -> list[list[Group]]:
    """Return the groups that are rounded between two runs of the block: one or all; then all experts of a module."""
    usual = [group for group in groups if group.expert is None]
    # A block without groups still needs one stage: it moves the original model's hidden states on.
    stages = [[group] for group in usual] if sequential else [usual] if usual else []
    experts = (group for group in groups if group.expert is not None)
    by_module = groupby(experts, lambda group: group.expert and group.expert.module)
    return [*stages, *(list(experts) for _, experts in by_module)] or [[]]


def make_problem(
    block: Block, group: Group, statistics: InputStatistics | None, grid: Grid, scale_dtype: torch.dtype
) -> Problem:
    """Return the rounding problem of a group. The weights of its linears are stacked along the rows."""
    linears = [linear_of(block.module, name) for name in group.linears]
    # Without statistics the weights keep their stored dtype: they are rounded strip by strip.
    weights = [linear.weight.data if statistics is None else linear.weight.data.float() for linear in linears]
    W = weights[0] if len(weights) == 1 else torch.cat(weights)
    clippable = [
        torch.full((linear.out_features,), name.rpartition(".")[2] not in _NOT_CLIPPED, device=W.device)
        for name, linear in zip(group.linears, linears, strict=True)
    ]
    return Problem(W, statistics, grid.on(W.shape[1]), scale_dtype, torch.cat(clippable))


def pad(problem: Problem) -> Problem:
    """Return the problem with rows of zeros added up to a multiple of ROW_MULTIPLE. They cost nothing in any loss."""
    more = -len(problem.W) % ROW_MULTIPLE
    if not more:
        return problem

    def longer(rows: Tensor) -> Tensor:
        return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])

    stats = problem.statistics
    if stats is not None and stats.target_moment is not None:
        moment_val = None if stats.target_moment_val is None else longer(stats.target_moment_val)
        stats = replace(stats, target_moment=longer(stats.target_moment), target_moment_val=moment_val)
    return replace(problem, W=longer(problem.W), statistics=stats, clippable=longer(problem.clippable))


def matched_problem(problem: Problem, match: Match, rows: slice) -> Problem:
    """Return the problem of some rows: with the matched weights, and without the target moments, now used up."""
    problem = problem.rows(rows.start, rows.stop)
    problem.W = matched(problem, match)
    if problem.statistics is not None:
        problem.statistics = replace(problem.statistics, target_moment=None, target_moment_val=None)
    return problem


def solve_rows(
    problem: Problem, slices: list[slice], algorithm: Algorithm, config: QuantizeConfig, ranks: Ranks
) -> tuple[Solution, tuple[float, float]]:
    """Solve the rows of this process; return the solution for the rows of all processes, and its errors.

    Args:
        problem: with the rows of this process alone.
        slices: the rows of each process.
    """
    solution = algorithm.solve(problem, config)
    errors = errors_of(problem, solution, algorithm.is_nearest(config), ranks)
    tensors = {name: ranks.joined(getattr(solution, name), slices) for name in ("q", "scale", "zero")}
    return replace(solution, **tensors), errors


def solve_in_first(
    problem: Problem, algorithm: Algorithm, config: QuantizeConfig, ranks: Ranks
) -> tuple[Solution, tuple[float, float]]:
    """Let the first process solve a problem whose rows cannot be solved apart; return the solution and its errors."""
    device = problem.W.device
    # The solution is sent from a CPU: the GPU of the first process has no meaning in the others.
    way = device if ranks.size == 1 else torch.device("cpu")
    solution = ranks.first(lambda: algorithm.solve(problem, config).to(way)).to(device)
    return solution, errors_of(problem, solution, algorithm.is_nearest(config), ranks)


def solve_alone(
    block: Block, group: Group, grid: Grid, scale_dtype: torch.dtype, ranks: Ranks
) -> tuple[Solution, tuple[float, float]]:
    """Round a group to nearest of which nothing but the weights is known; return the solution and its errors."""
    problem = make_problem(block, group, None, replace(grid, search="mse"), scale_dtype)
    solution = round_to_nearest(problem)
    return solution, errors_of(problem, solution, True, ranks)


def weights_of(block: Block, group: Group, solution: Solution, bits: int) -> dict[str, QuantizedWeight]:
    """Return the quantized weight of each linear of a group, by name."""
    rows = [linear_of(block.module, name).out_features for name in group.linears]
    tensors = zip(solution.q.split(rows), solution.scale.split(rows), solution.zero.split(rows), strict=True)
    return {name: QuantizedWeight(*of_linear, bits) for name, of_linear in zip(group.linears, tensors, strict=True)}


def errors_of(problem: Problem, solution: Solution, is_nearest: bool, ranks: Ranks) -> tuple[float, float]:
    """Return the relative error of a solution and that of plain rounding, both over the rows of all processes.

    `is_nearest`: the solution itself is plain rounding to nearest.
    """
    H = None if problem.statistics is None else problem.statistics.H_val
    lost = [lost_energy(problem, solution, H)]
    if not is_nearest:
        lost.append(lost_energy(problem, round_to_nearest(problem), H))
    mine = numbers([lost[0], lost[-1], energy(problem.W, H)])
    error, nearest_error, whole = (fsum(column) for column in zip(*ranks.each(mine), strict=True))
    return (error / whole, nearest_error / whole) if whole > 0 else (0.0, 0.0)
