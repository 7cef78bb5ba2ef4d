"""One quantization as it goes from block to block: what was decided for all of them, and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmq.algorithms import ALGORITHMS
from llmq.algorithms.match import match
from llmq.algorithms.problem import Problem, Solution, relative_error, round_to_nearest
from llmq.arch import (
    Group,
    find_groups,
    fit_group_size,
    left_in_float,
    linear_of,
    packable_widths,
    split_packable,
)
from llmq.block import Block
from llmq.clock import Clock
from llmq.config import QuantizeConfig
from llmq.digest import digest
from llmq.errors import RequestError, WorkError
from llmq.formats import FORMATS
from llmq.formats.scheme import Scheme
from llmq.layer_bits import bits_of_linears
from llmq.memory import release_memory
from llmq.report import Report
from llmq.settings import Grid
from llmq.source import ModelSource
from llmq.statistics import collect_statistics
from llmq.weight import QuantizedWeight

# Queries and keys meet in a dot product, where a clipped outlier costs more than its own error says (as in AWQ).
_NOT_CLIPPED = ("q_proj", "k_proj", "qkv_proj")


class Run:
    """The state of one quantization: what holds for all blocks, and the report."""

    def __init__(self, config: QuantizeConfig, source: ModelSource, device: torch.device, clock: Clock) -> None:
        self.config, self.source, self.device, self.clock = config, source, device, clock
        self.algorithm = ALGORITHMS[config.method]
        self.format = FORMATS[config.stored_as]
        self.report = Report(config)
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

    def quantize_block(self, block: Block, show: Callable[[str], None]) -> dict[str, Tensor]:
        """Put the quantized values into the block; returns all of its tensors for the checkpoint."""
        groups, skipped = split_packable(block.module, find_groups(block.module, block.run, block.hidden[0][:1]))
        self.report.note(block.name, [f"{name} left in float: {reason}" for name, reason in skipped.items()])
        drift = block.drift
        if drift is not None:
            self.report.drifts[block.name] = drift
        changed, transformed = self._transform(block, groups)
        if self.sequential:
            block.expect(groups)
        problems: list[Problem] = []  # of all groups, where they are refined together
        solutions: list[Solution] = []
        # Without groups there is still the original model's own way through the block.
        stages = ([[group] for group in groups] or [[]]) if self.sequential else [groups]
        for stage in stages:
            posed = transformed or self._problems(block, stage, last=stage is stages[-1])
            for group, problem in zip(stage, posed, strict=True):
                solutions.append(self._solve(block, group, problem, show))
                if self.refine is not None:
                    problems.append(problem)
        solutions = self._refine(block, groups, problems, solutions)
        packed: dict[str, Tensor] = {}
        with self.clock("write"):
            for group, solution in zip(groups, solutions, strict=True):
                for name, weight in self._weights(block, group, solution).items():
                    packed |= self._encoded(f"{block.name}.{name}", weight)
        return packed | self.unchanged(self._remaining(block, groups, changed))

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
        with self.clock("solve"):
            changed, notes = self.algorithm.transform(block, groups, problems, self.config)
        self.report.note(block.name, notes)
        return changed, None if self.matching or self.sequential else problems

    def _solve(self, block: Block, group: Group, problem: Problem, show: Callable[[str], None]) -> Solution:
        """Round the linears of one group, with whose quantized weights the block computes from here on."""
        with self.clock("solve"):
            matched = match(problem)
            problem.W = matched.W
            baseline = _loss(problem, round_to_nearest(problem))
            solution = replace(self.algorithm.solve(problem, self.config), matched=matched.step)
            loss = _loss(problem, solution)
            self._put_back(block, group, solution)
            self.report.add_group(block.name, group.linears, (loss, baseline), solution, problem.statistics)
            release_memory()
        show(f"{group.linears[-1]} loss {loss:.2e}")
        return solution

    def _refine(
        self, block: Block, groups: list[Group], problems: list[Problem], solutions: list[Solution]
    ) -> list[Solution]:
        """Let the method improve on what it found for the groups, seen together, if it can."""
        if self.refine is None or not groups:
            return solutions
        with self.clock("refine"):
            solutions, objective = self.refine(block, groups, problems, solutions, self.config)
        self.report.refined[block.name] = objective
        entries = self.report.groups[-len(groups) :]
        for group, entry, problem, solution in zip(groups, entries, problems, solutions, strict=True):
            entry["error"] = _loss(problem, solution)
            self._put_back(block, group, solution)
        return solutions

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
        widths = packable_widths(self.source.blocks)
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
        problems = []
        for group, stats in zip(groups, statistics, strict=True):
            linears = [linear_of(block.module, name) for name in group.linears]
            W = torch.cat([linear.weight.float() for linear in linears])
            clippable = [
                torch.full((linear.out_features,), name.rpartition(".")[2] not in _NOT_CLIPPED, device=W.device)
                for name, linear in zip(group.linears, linears, strict=True)
            ]
            size = W.shape[1] if self.grid.group_size == -1 else self.grid.group_size
            grid = replace(self.grid, group_size=size, bits=self._bits_of(block, group))
            problems.append(Problem(W, stats, grid, self.scale_dtype, torch.cat(clippable)))
        return problems

    def _remaining(self, block: Block, groups: list[Group], changed: set[str]) -> dict[str, Tensor]:
        """Everything of the block that is not a packed weight: as on disk, unless the transform changed it."""
        packed = {f"{name}.weight" for group in groups for name in group.linears}
        current = block.module.state_dict()
        remaining: dict[str, Tensor] = {}
        for name in self.source.block_tensor_names(block.name):
            inner = name.removeprefix(block.name + ".")
            if inner not in packed:
                stored = self.source.read(name)
                remaining[name] = current[inner].to(stored.dtype) if inner in changed else stored
        return remaining


def _loss(problem: Problem, solution: Solution) -> float:
    """Relative output error on held-out tokens; relative weight error where there are no statistics."""
    H = None if problem.statistics is None else problem.statistics.H_val
    return relative_error(problem.W, solution.dequantize(problem.grid.group_size), H)
