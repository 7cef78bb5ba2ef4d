"""One quantization as it goes from block to block: what was decided for all of them, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llmq.algorithms import ALGORITHMS
from llmq.algorithms.output_matching import choose
from llmq.algorithms.problem import ROW_MULTIPLE, Problem, Solution
from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.input_statistics import collect_statistics
from llmq.checkpoint.digests import digest
from llmq.core.config import QuantizeConfig
from llmq.core.distributed import ALONE, Ranks
from llmq.core.errors import RequestError, WorkError
from llmq.core.memory import release_memory
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import Grid
from llmq.core.timing import Clock
from llmq.formats import FORMATS
from llmq.formats.scheme import Scheme
from llmq.models.block_structure import (
    Group,
    find_groups,
    fit_group_size,
    left_in_float,
    linear_of,
    packable_widths,
    split_packable,
)
from llmq.models.model_source import ModelSource
from llmq.run.journal import Line
from llmq.run.layer_bits import bits_of_linears
from llmq.run.layer_problem import errors_of, posed, take_matched
from llmq.run.report import Report


@dataclass
class _Solved:
    """A group of linears whose weights are rounded."""

    group: Group
    solution: Solution
    entry: Line
    """For the report."""
    problem: Problem | None
    """Where it will be needed once more."""


class Run:
    """The state of one quantization: what holds for all blocks, and the report.

    Args:
        tell: is given the report's entry of each group as it comes.
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
        self.format = FORMATS[config.stored_as]
        self.report = Report(config, clock, tell)
        self.chosen = [source.block_names[i] for i in config.chosen_blocks(len(source.blocks))]
        """Names of the blocks to quantize."""
        self.grid = self._fitted_grid()
        self.bits = bits_of_linears(config, source)
        self.schemes: dict[str, Scheme] = {}
        """How each linear was packed, by its name in the model."""
        self.digests: dict[str, str] = {}
        """What tells later whether a packed linear or other tensor is what was computed."""
        if config.stored_as == "compressed-tensors" and not config.symmetric:
            note = "asymmetric compressed-tensors: transformers opens it only with dequantize=True"
            self.report.note("model", [f"{note}, and not with --layer-bits (vLLM and llmq do)"])
        # float32 scales would double the cost of a group for digits the codes make no use of.
        self.scale_dtype = torch.float16 if source.dtype == torch.float32 else source.dtype
        self.matching = self.algorithm.includes("match", config)
        self.sequential = self.algorithm.includes("sequential", config)
        self.refine = self.algorithm.refine if config.tuned.steps else None
        if self.matching and config.samples < 2:
            self.report.note("model", ["a single sample leaves none to hold out: outputs are not matched"])

    def linear_dtype(self, compute: Compute) -> torch.dtype:
        """In which a block's linears are loaded: as stored, in half the memory, where matmuls take that and nothing
        changes them before they are rounded."""
        as_stored = self.algorithm.transform is None and self.source.dtype == compute.factors
        return compute.factors if as_stored else compute.dtype

    def outside(self) -> Iterator[dict[str, Tensor]]:
        """The tensors outside the blocks, one at a time, in the process that writes."""
        for name in self.source.outer_names() if self.ranks.is_first else ():
            yield self.unchanged({name: self.source.read(name)})

    def untouched(self, block: str) -> Iterator[dict[str, Tensor]]:
        """The tensors of a block that stays as it is, module by module, in the process that writes."""
        names = self.source.block_tensor_names(block) if self.ranks.is_first else []
        for _, together in groupby(names, key=lambda name: name.rpartition(".")[0]):
            yield self.unchanged({name: self.source.read(name) for name in together})

    def quantize_block(self, block: Block, show: Callable[[str], None]) -> dict[str, Tensor]:
        """Put the quantized values into the block; returns its tensors, for the process that writes."""
        if block.name not in self.chosen:
            collect_statistics(block, [], self.clock)  # the original model's own way through
            return self._remaining(block, [], set())
        assert block.sample is not None
        groups, skipped = split_packable(block.module, find_groups(block.module, block.run, block.sample))
        self.report.note(block.name, [f"{name} left in float: {reason}" for name, reason in skipped.items()])
        drift = block.drift
        if drift is not None:
            self.report.drifts[block.name] = drift
        changed, transformed = self._transform(block, groups)
        if self.sequential:
            block.expect(groups)
        solved: list[_Solved] = []
        # Without groups there is still the original model's own way through the block.
        stages = ([[group] for group in groups] or [[]]) if self.sequential else [groups]
        for stage in stages:
            problems = transformed or self._problems(block, stage, last=stage is stages[-1])
            for group in stage:
                # Popped, so that statistics are gone when those of the next stage are summed.
                solved.append(self._solve(block, group, problems.pop(0), show))
        if self.refine is not None and solved:
            self._refine(block, solved)
        packed: dict[str, Tensor] = {}
        with self.clock("write"):
            for each in solved if self.ranks.is_first else ():
                for name, weight in self._weights(block, each.group, each.solution).items():
                    packed |= self._encoded(f"{block.name}.{name}", weight)
        return packed | self._remaining(block, groups, changed)

    def unchanged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are stored as they are, noted for the check."""
        self.digests.update({name: digest(tensor) for name, tensor in tensors.items()})
        return tensors

    def _encoded(self, name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        self.digests[name] = digest(weight)
        self.schemes[name] = Scheme(weight.bits, self.grid.group_size, self.grid.symmetric)
        return self.format.encode(name, weight, self.schemes[name])

    def _transform(self, block: Block, groups: list[Group]) -> tuple[set[str], list[Problem] | None]:
        """Let the method change the block before anything is rounded.

        Returns the other tensors that changed, and the problems as they are now, unless their inputs will change or the
        original model's outputs, which they do not know, are to be matched.
        """
        if self.algorithm.transform is None:
            return set(), None
        problems = self._problems(replace(block, original=None), groups, last=False)
        block.keep_original()
        with self.clock("solve"):
            changed, notes = self.algorithm.transform(block, groups, problems, self.config)
        self.report.note(block.name, notes)
        return changed, None if self.matching or self.sequential else problems

    def _solve(self, block: Block, group: Group, problem: Problem, show: Callable[[str], None]) -> _Solved:
        """Round the linears of one group, with whose quantized weights the block computes from here on."""
        is_nearest = self.algorithm.is_nearest(self.config)
        with self.clock("solve"):
            choice = choose(problem, self.ranks)
            if self.algorithm.rows_apart(self.config):
                slices = self.ranks.rows(len(problem.W), ROW_MULTIPLE)
                mine = slices[self.ranks.rank]
                take_matched(problem := problem.rows(mine.start, mine.stop), choice)
                solution = self.algorithm.solve(problem, self.config)
                errors = errors_of(problem, solution, is_nearest, self.ranks)
                parts = {part: self.ranks.joined(getattr(solution, part), slices) for part in ("q", "scale", "zero")}
                solution = replace(solution, **parts)
            else:
                take_matched(problem, choice)
                # On its way to other processes it must not name the first one's GPU.
                way = self.device if self.ranks.size == 1 else torch.device("cpu")
                solution = self.ranks.first(lambda: self.algorithm.solve(problem, self.config).to(way)).to(self.device)
                errors = errors_of(problem, solution, is_nearest, self.ranks)
            solution = replace(solution, matched=choice.step)
            if problem.statistics is not None:  # else nobody looks at what the block computes
                self._put_back(block, group, solution)
            entry = self.report.group(block.name, group.linears, errors, solution, problem.statistics)
            release_memory()
        show(f"{group.linears[-1]} loss {errors[0]:.2e}")
        if self.refine is None:
            self.report.add(entry)
        return _Solved(group, solution, entry, problem if self.refine is not None else None)

    def _refine(self, block: Block, solved: list[_Solved]) -> None:
        """Let the method improve on what it found for the groups, seen together."""
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

    def _weights(self, block: Block, group: Group, solution: Solution) -> dict[str, QuantizedWeight]:
        """The solution of a group, by linear."""
        rows = [linear_of(block.module, name).out_features for name in group.linears]
        parts = zip(solution.q.split(rows), solution.scale.split(rows), solution.zero.split(rows), strict=True)
        bits = self._bits_of(block, group)
        weights = (QuantizedWeight(q, scale, zero, bits) for q, scale, zero in parts)
        return dict(zip(group.linears, weights, strict=True))

    def _put_back(self, block: Block, group: Group, solution: Solution) -> None:
        """The block computes with the quantized weights from here on."""
        for name, weight in self._weights(block, group, solution).items():
            block.replace_weight(name, weight.dequantize())

    def _bits_of(self, block: Block, group: Group) -> int:
        """The bits that the linears of a group share. Raises RequestError if they were asked to differ."""
        bits = {self.bits[f"{block.name}.{name}"] for name in group.linears}
        if len(bits) > 1:
            raise RequestError(f"{', '.join(group.linears)} share an input and are rounded together: same bits for all")
        return bits.pop()

    def hf_config(self) -> dict[str, Any]:
        """The quantization_config, listing every linear that stays in float."""
        if not self.schemes:
            raise WorkError("no linear of this model could be packed: " + self.report.notes[-1]["note"])
        return self.format.hf_config(self.schemes, left_in_float(self.source.skeleton, self.schemes))

    def _fitted_grid(self) -> Grid:
        """The requested grid with a group size that divides every layer, known from the shapes alone."""
        widths = packable_widths([self.source.skeleton.get_submodule(name) for name in self.chosen])
        if not widths:
            raise RequestError("no linear of this model can be packed: none has both sides in multiples of 32")
        requested = self.config.grid_settings
        fitted = fit_group_size(requested.group_size, widths)
        if fitted != requested.group_size:
            note = f"group size {requested.group_size} does not divide every layer: using {fitted}"
            self.report.note("model", [note])
        return replace(requested, group_size=fitted)

    def _problems(self, block: Block, groups: list[Group], last: bool) -> list[Problem]:
        """One rounding problem per group, with the statistics the method needs."""
        if self.algorithm.needs_statistics(self.config):
            statistics = collect_statistics(block, groups, self.clock, last)
        else:
            statistics = [None] * len(groups)
        return [
            posed(block, group, stats, replace(self.grid, bits=self._bits_of(block, group)), self.scale_dtype)
            for group, stats in zip(groups, statistics, strict=True)
        ]

    def _remaining(self, block: Block, groups: list[Group], changed: set[str]) -> dict[str, Tensor]:
        """Everything of the block that is not a packed weight: as on disk, unless the transform changed it."""
        packed = {f"{name}.weight" for group in groups for name in group.linears}
        current = block.module.state_dict()
        remaining: dict[str, Tensor] = {}
        for name in self.source.block_tensor_names(block.name) if self.ranks.is_first else ():
            inner = name.removeprefix(block.name + ".")
            if inner not in packed:
                stored = self.source.read(name)
                remaining[name] = current[inner].to(stored.dtype) if inner in changed else stored
        return self.unchanged(remaining)
