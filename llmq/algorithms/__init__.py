"""The methods by name. Each solves a Problem; some transform the block first, some refine the solutions after."""

from collections.abc import Callable
from dataclasses import dataclass

from llmq.algorithms import awq, best_of, gptq, rtn, tuned
from llmq.algorithms.problem import Problem, Solution
from llmq.calibration.block_runner import Block
from llmq.core.config import QuantizeConfig
from llmq.models.block_structure import Group

# Changes the block and its problems in place before the problems are solved. The block's outputs stay the same. If it
# divides the input of a group by something, block.folds tells: output matching compares with the original's inputs.
# Returns the names of the other tensors of the block that changed, and fallbacks.
Transform = Callable[[Block, list[Group], list[Problem], QuantizeConfig], tuple[set[str], list[str]]]

# Improves the solutions of all groups of a block together. Returns them, and the held-out loss before and after.
Refined = tuple[list[Solution], tuple[float, float]]
Refine = Callable[[Block, list[Group], list[Problem], list[Solution], QuantizeConfig], Refined]


@dataclass(frozen=True)
class Algorithm:
    """The functions and properties of one method."""

    solve: Callable[[Problem, QuantizeConfig], Solution]
    transform: Transform | None = None
    refine: Refine | None = None
    needs_statistics: Callable[[QuantizeConfig], bool] = lambda _: True
    rows_apart: Callable[[QuantizeConfig], bool] = lambda _: True
    """True if rows solved apart get the same codes as rows solved together."""
    is_nearest: Callable[[QuantizeConfig], bool] = lambda _: False  # true if `solve` is plain rounding to nearest

    def includes(self, effort_step: str, config: QuantizeConfig) -> bool:
        """Return True if the config asks for this one of EFFORT_STEPS: see QuantizeConfig.without."""
        return self.needs_statistics(config) and config.effort != "fast" and effort_step not in config.without


def _gptq(problem: Problem, config: QuantizeConfig) -> Solution:
    return (best_of if config.effort == "best" else gptq).solve(problem, config.gptq)


def _awq_transform(
    block: Block, groups: list[Group], problems: list[Problem], config: QuantizeConfig
) -> tuple[set[str], list[str]]:
    return awq.transform(block, groups, problems, config.awq)


def _rows_apart(config: QuantizeConfig) -> bool:
    """Return False at effort best, which keeps or drops a trial for all rows together."""
    return config.effort != "best"


ALGORITHMS = {
    "rtn": Algorithm(
        lambda problem, _: rtn.solve(problem),
        needs_statistics=lambda config: config.grid == "hessian",
        is_nearest=lambda config: config.grid in ("auto", "minmax"),
    ),
    "gptq": Algorithm(_gptq, rows_apart=_rows_apart),
    "awq": Algorithm(lambda problem, config: awq.solve(problem, config.awq), _awq_transform),
    "awq+gptq": Algorithm(_gptq, _awq_transform, rows_apart=_rows_apart),
    "tuned": Algorithm(
        _gptq,
        refine=lambda block, groups, problems, solutions, config: tuned.refine(
            block, groups, problems, solutions, config.tuned
        ),
        rows_apart=_rows_apart,
    ),
}
