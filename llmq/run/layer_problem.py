"""What a block asks of the rounding algorithms: one problem per group of linears, and what its answer is worth."""

from __future__ import annotations

from dataclasses import replace
from math import fsum

import torch

from llmq.algorithms.output_matching import Match, matched
from llmq.algorithms.problem import Problem, Solution, energy, lost_energy, round_to_nearest
from llmq.calibration.block_runner import Block
from llmq.calibration.input_statistics import InputStatistics
from llmq.core.distributed import Ranks
from llmq.core.settings import Grid
from llmq.models.block_structure import Group, linear_of

# Queries and keys meet in a dot product, where a clipped outlier costs more than its own error says (as in AWQ).
_NOT_CLIPPED = ("q_proj", "k_proj", "qkv_proj")


def posed(
    block: Block, group: Group, statistics: InputStatistics | None, grid: Grid, scale_dtype: torch.dtype
) -> Problem:
    """The problem of a group, whose linears are stacked."""
    linears = [linear_of(block.module, name) for name in group.linears]
    # As stored where only they are looked at, strip by strip.
    weights = [linear.weight.data if statistics is None else linear.weight.data.float() for linear in linears]
    W = weights[0] if len(weights) == 1 else torch.cat(weights)
    clippable = [
        torch.full((linear.out_features,), name.rpartition(".")[2] not in _NOT_CLIPPED, device=W.device)
        for name, linear in zip(group.linears, linears, strict=True)
    ]
    return Problem(W, statistics, grid.on(W.shape[1]), scale_dtype, torch.cat(clippable))


def take_matched(problem: Problem, choice: Match) -> None:
    """Round these weights, and forget what they were found by."""
    problem.W = matched(problem, choice)
    if problem.statistics is not None:
        problem.statistics = replace(problem.statistics, target_moment=None, target_moment_val=None)


def errors_of(problem: Problem, solution: Solution, is_nearest: bool, ranks: Ranks) -> tuple[float, float]:
    """Relative error of a solution and of plain rounding to nearest, over the rows of all processes.

    Args:
        is_nearest: the solution is that of plain rounding.
    """
    H = None if problem.statistics is None else problem.statistics.H_val
    lost = [lost_energy(problem, solution, H)]
    if not is_nearest:
        lost.append(lost_energy(problem, round_to_nearest(problem), H))
    mine = (lost[0], lost[-1], energy(problem.W, H))
    error, nearest_error, whole = (fsum(column) for column in zip(*ranks.each(mine), strict=True))
    return (error / whole, nearest_error / whole) if whole > 0 else (0.0, 0.0)
