"""The methods by name. One is a way to solve a Problem, perhaps after transforming the block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llmq.algorithms import awq, best_of, gptq, rtn, tuned
from llmq.algorithms.problem import Problem, Solution
from llmq.calibration.block_runner import Block
from llmq.core.config import QuantizeConfig
from llmq.models.block_structure import Group

# Changes the block and its problems in place, without changing what the block computes, before the problems are solved.
# Returns the names of the other tensors of the block that changed, and fallbacks.
Transform = Callable[[Block, list[Group], list[Problem], QuantizeConfig], tuple[set[str], list[str]]]


# Improves on the solutions of a block's groups, seen together. Returns them, and what it minimises on held-out tokens,
# before and after.
Refine = Callable[
    [Block, list[Group], list[Problem], list[Solution], QuantizeConfig], tuple[list[Solution], tuple[float, float]]
]


@dataclass(frozen=True)
class Algorithm:
    """How a method turns the weights of a block into codes."""

    solve: Callable[[Problem, QuantizeConfig], Solution]
    transform: Transform | None = None
    refine: Refine | None = None
    needs_statistics: Callable[[QuantizeConfig], bool] = lambda _: True

    rows_apart: Callable[[QuantizeConfig], bool] = lambda _: True
    """Whether `solve` gives rows that are solved apart the codes that they get together."""
    is_nearest: Callable[[QuantizeConfig], bool] = lambda _: False
    """Whether `solve` is plain rounding to nearest."""

    def includes(self, part: str, config: QuantizeConfig) -> bool:
        """Whether this part of an effort is wanted: see QuantizeConfig.without."""
        return self.needs_statistics(config) and config.effort != "fast" and part not in config.without


def _gptq(problem: Problem, config: QuantizeConfig) -> Solution:
    return (best_of if config.effort == "best" else gptq).solve(problem, config.gptq)


def _awq_transform(
    block: Block, groups: list[Group], problems: list[Problem], config: QuantizeConfig
) -> tuple[set[str], list[str]]:
    return awq.transform(block, groups, problems, config.awq)


def _tuned(
    block: Block, groups: list[Group], problems: list[Problem], solutions: list[Solution], config: QuantizeConfig
) -> tuple[list[Solution], tuple[float, float]]:
    return tuned.refine(block, groups, problems, solutions, config.tuned)


def _not_gated(config: QuantizeConfig) -> bool:
    """What effort best keeps is decided for all rows."""
    return config.effort != "best"


ALGORITHMS = {
    "rtn": Algorithm(
        lambda problem, _: rtn.solve(problem),
        needs_statistics=lambda config: config.grid == "hessian",
        is_nearest=lambda config: config.grid in ("auto", "minmax"),
    ),
    "gptq": Algorithm(_gptq, rows_apart=_not_gated),
    "awq": Algorithm(lambda problem, config: awq.solve(problem, config.awq), _awq_transform),
    "awq+gptq": Algorithm(_gptq, _awq_transform, rows_apart=_not_gated),
    "tuned": Algorithm(_gptq, refine=_tuned, rows_apart=_not_gated),
}
