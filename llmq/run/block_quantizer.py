"""Quantizes one decoder block: transform it, round its groups of linears, refine them, encode the result.

    block ──► find groups ──► transform ──► sum statistics, solve, put back ──► refine ──► encode ──► tensors to write
                              (awq)         once a stage: one group, or all     (tuned)

A group is a set of linears that read the same input. They are rounded together, as one stacked matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmq.algorithms import ALGORITHMS
from llmq.algorithms.output_matching import choose
from llmq.algorithms.problem import ROW_MULTIPLE, Problem, Solution
from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.input_statistics import InputStatistics, collect_statistics
from llmq.core.config import QuantizeConfig
from llmq.core.distributed import ALONE, Ranks
from llmq.core.memory import release_memory
from llmq.core.timing import Clock
from llmq.formats import FORMATS, gptq
from llmq.models.block_structure import Group
from llmq.models.experts import layouts
from llmq.models.model_source import ModelSource
from llmq.run.block_tensors import BlockTensors
from llmq.run.expert_groups import statistics_of_experts
from llmq.run.journal import Line
from llmq.run.layer_bits import bits_of_group, bits_of_linears, fitted_grid
from llmq.run.layer_problem import (
    Solved,
    errors_of,
    make_problem,
    matched_problem,
    packable_groups,
    pad,
    solve_alone,
    solve_in_first,
    solve_rows,
    stages_of,
    weights_of,
)
from llmq.run.report import Report


class Run:
    """Quantizes the blocks of a model one by one; holds the settings and the report that all of them share.

    `tell`: called with the report's entry of each group once it is final.
    """

    def __init__(
        self,
        config: QuantizeConfig,
        source: ModelSource,
        device: torch.device,
        clock: Clock,
        ranks: Ranks = ALONE,
        tell: Callable[[Line], None] = lambda _: None,
    ) -> None:
        self.config, self.source, self.device, self.clock, self.ranks = config, source, device, clock, ranks
        self.algorithm = ALGORITHMS[config.method]
        self.report = Report(config, clock, tell)
        self.chosen = [source.block_names[i] for i in config.chosen_blocks(len(source.blocks))]
        """Names of the blocks to quantize."""
        self.bits = bits_of_linears(config, source)
        self.grid, notes = fitted_grid(config, source, self.chosen, self.bits)
        self.format = FORMATS[config.streamed_as]
        self.tensors = BlockTensors(source, self.format, self.grid)
        # float32 scales would double the cost of a group; the codes have no use for the extra digits.
        # GGUF stores float16.
        to_float16 = source.dtype == torch.float32 or config.stored_as == "gguf"
        self.scale_dtype = torch.float16 if to_float16 else source.dtype
        self.matching = self.algorithm.includes("match", config)
        """Whether weights move towards the original model's outputs before they are rounded."""
        self.sequential = self.algorithm.includes("sequential", config)
        """Whether each group sees the quantized weights of the groups before it in its block."""
        self.refine = self.algorithm.refine if config.tuned.steps else None
        if layouts(source.skeleton):
            notes += ["awq scales no inputs of experts"] * (self.algorithm.transform is not None)
            notes += ["the training of single blocks leaves experts as they are"] * (self.refine is not None)
        if self.matching and config.samples < 2:
            notes.append("a single sample leaves none to hold out: outputs are not matched")
        if self.format is gptq and not self.grid.symmetric:
            notes.append(gptq.ASYMMETRIC_NOTE)
        self.report.note("model", notes)

    def assign(self, bits: Mapping[str, int]) -> None:
        """Give these linears other bits, before any block is quantized. `bits`: by the name in the model."""
        self.bits |= bits
        told = {each["note"] for each in self.report.notes}
        _, notes = fitted_grid(self.config, self.source, self.chosen, self.bits)
        self.report.note("model", [note for note in notes if note not in told])

    def linear_dtype(self, compute: Compute) -> torch.dtype:
        """Return the dtype in which the linears of a block are loaded.

        It is the stored one, at half the memory, if matmuls take it and no transform changes the weights.
        """
        as_stored = self.algorithm.transform is None and self.source.dtype == compute.factors
        return compute.factors if as_stored else compute.dtype

    def quantize_block(self, block: Block, show: Callable[[str], None]) -> Iterator[dict[str, Tensor]]:
        """Replace the weights of a block by quantized ones; yield all its tensors, packed or as they are.

        Those of an expert come as soon as it is solved, so that the codes of all experts are never in memory together.
        Processes that do not write get no tensors. `show` is called with a line about each group that was solved.
        """
        if block.name not in self.chosen:
            collect_statistics(block, [], self.clock)  # only moves the original model's hidden states on
            yield self._others(block, [], set())
            return
        groups, skipped = packable_groups(block, self.source, self.bits)
        self.report.note(block.name, [f"{name} left in float: {reason}" for name, reason in skipped.items()])
        if (drift := block.drift) is not None:
            self.report.drifts[block.name] = drift
        usual = [group for group in groups if group.calls == 1]
        changed, problems = self._transform(block, [group for group in usual if group.expert is None])
        solved = [self._round(block, group) for group in groups if group.calls != 1]
        for each in self._solve_groups(block, usual, problems, show):
            if each.group.expert is None:
                solved.append(each)
            else:
                yield self._encoded(block, [each])
        if trained := [each for each in solved if each.problem is not None]:
            self._refine(block, trained)
        yield self._encoded(block, solved) | self._others(block, groups, changed)

    def _transform(self, block: Block, groups: list[Group]) -> tuple[set[str], list[Problem] | None]:
        """Let the method change the block before its weights are rounded.

        Returns the names of the other tensors that changed, and the problems of the groups. They are None if they must
        be made anew: with `sequential` the inputs change, and with `matching` the problems lack the target moments.
        """
        if self.algorithm.transform is None:
            return set(), None
        problems = self._problems(replace(block, original=None), groups, last=False, magnitudes=True)
        block.keep_original()
        with self.clock("solve"):
            changed, notes = self.algorithm.transform(block, groups, problems, self.config)
        self.report.note(block.name, notes)
        return changed, None if self.matching or self.sequential else problems

    def _bits_of(self, block: Block, group: Group) -> int:
        return bits_of_group(self.bits, block.name, group.linears)

    def _problems(self, block: Block, groups: list[Group], last: bool, magnitudes: bool = False) -> list[Problem]:
        """Return one rounding problem per group, with the statistics that the method needs."""
        statistics: Sequence[InputStatistics | None] = [None] * len(groups)
        if self.algorithm.needs_statistics(self.config):
            statistics = collect_statistics(block, groups, self.clock, last, magnitudes)
        return [self._problem(block, group, stats) for group, stats in zip(groups, statistics, strict=True)]

    def _problem(self, block: Block, group: Group, statistics: InputStatistics | None) -> Problem:
        grid = replace(self.grid, bits=self._bits_of(block, group))
        return make_problem(block, group, statistics, grid, self.scale_dtype)

    def _solve_groups(
        self, block: Block, groups: list[Group], problems: list[Problem] | None, show: Callable[[str], None]
    ) -> Iterator[Solved]:
        """Round the weights of all groups, stage by stage. The block runs over the text once before each stage.

        `problems`: those of all groups but the experts', if they are known already; the list is emptied. None: made for
        each stage.
        """
        stages = stages_of(groups, self.sequential)
        if self.sequential:
            block.expect(stages)
        for stage in stages:
            last = stage is stages[-1]
            if stage and stage[0].expert is not None:
                yield from self._solve_experts(block, stage, last, show)
                continue
            waiting = self._problems(block, stage, last) if problems is None else problems
            for group in stage:
                # pop: nothing holds the problem after this call. Its large statistics must be freed before those of the
                # next stage are summed.
                yield self._solve(block, group, waiting.pop(0), show)

    def _solve_experts(
        self, block: Block, groups: list[Group], last: bool, show: Callable[[str], None]
    ) -> Iterator[Solved]:
        """Round the experts of a module, one after the other. The block runs over the text once for all of them."""
        needed = self.algorithm.needs_statistics(self.config)
        measured = statistics_of_experts(block, groups, self.config, self.clock, last) if needed else ()
        for group, statistics in measured or ((group, None) for group in groups):
            yield self._solve(block, group, self._problem(block, group, statistics), show)

    def _solve(self, block: Block, group: Group, problem: Problem, show: Callable[[str], None]) -> Solved:
        """Round the linears of one group. From here on the block computes with their quantized weights."""
        with self.clock("solve"):
            rows, problem = len(problem.W), pad(problem)
            match = choose(problem, self.ranks)
            if self.algorithm.rows_apart(self.config):
                slices = self.ranks.rows(len(problem.W), ROW_MULTIPLE)
                problem = matched_problem(problem, match, slices[self.ranks.rank])
                solution, errors = solve_rows(problem, slices, self.algorithm, self.config, self.ranks)
            else:
                problem = matched_problem(problem, match, slice(0, len(problem.W)))
                solution, errors = solve_in_first(problem, self.algorithm, self.config, self.ranks)
            problem, solution = problem.rows(0, rows), replace(solution.rows(0, rows), matched=match.alpha)
            if problem.statistics is not None:  # otherwise nobody runs the block
                self._put_back(block, group, solution)
            entry = self.report.group(block.name, group, errors, solution, problem.statistics)
            release_memory()
        show(f"{group.linears[-1]} loss {errors[0]:.2e}")
        is_trained = self.refine is not None and group.expert is None
        if not is_trained:
            self.report.add(entry)
        return Solved(group, solution, entry, problem if is_trained else None)

    def _round(self, block: Block, group: Group) -> Solved:
        """Round a linear that runs never or often: an expert that nobody chose, attention to a picture."""
        grid = replace(self.grid, bits=self._bits_of(block, group))
        solution, errors = solve_alone(block, group, grid, self.scale_dtype, self.ranks)
        entry = self.report.group(block.name, group, errors, solution, None)
        if self.algorithm.needs_statistics(self.config):  # the next groups see what it computes now
            self._put_back(block, group, solution)
            runs = "did not run on the first calibration sequence" if group.calls == 0 else f"runs {group.calls} times"
            self.report.note(f"{block.name}.{group.linears[0]}", [f"it {runs}: rounded to nearest"])
        self.report.add(entry)
        return Solved(group, solution, entry, None)

    def _put_back(self, block: Block, group: Group, solution: Solution) -> None:
        for name, weight in weights_of(block, group, solution, self._bits_of(block, group)).items():
            block.replace_weight(name, weight.dequantize())

    def _refine(self, block: Block, solved: list[Solved]) -> None:
        """Let the method improve the solutions of all groups together."""
        groups, solutions = [each.group for each in solved], [each.solution for each in solved]
        problems = [each.problem for each in solved if each.problem is not None]
        assert self.refine is not None
        with self.clock("refine"):
            solutions, objective = self.refine(block, groups, problems, solutions, self.config)
        self.report.refined[block.name] = objective
        for each, problem, solution in zip(solved, problems, solutions, strict=True):
            each.solution = solution
            self.report.add(each.entry | {"error": errors_of(problem, solution, False, self.ranks)[0]})
            self._put_back(block, each.group, solution)

    def _encoded(self, block: Block, solved: list[Solved]) -> dict[str, Tensor]:
        """Return the packed tensors of these groups, in the process that writes."""
        packed: dict[str, Tensor] = {}
        with self.clock("write"):
            for each in solved if self.ranks.is_first else ():
                weights = weights_of(block, each.group, each.solution, self._bits_of(block, each.group))
                packed |= self.tensors.packed(block.name, weights)
        return packed

    def _others(self, block: Block, groups: list[Group], changed: set[str]) -> dict[str, Tensor]:
        """Return all tensors of the block but the packed weights, in the process that writes."""
        packed = {name for group in groups for name in group.linears}
        return self.tensors.others(block, packed, changed) if self.ranks.is_first else {}
