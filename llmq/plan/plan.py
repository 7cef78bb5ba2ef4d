"""Collects what a run will do and need: layers, sizes, memory, disk and, for a dry run, time."""

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import nn

from llmq.calibration.hidden_states import States
from llmq.calibration.work_split import micro_batches
from llmq.core.distributed import processes_here
from llmq.core.memory import free_memory, resident_now
from llmq.core.timing import Clock
from llmq.models.experts import layouts as modules_of_experts
from llmq.models.packed_share import PackedShare, packed_share
from llmq.models.stored_names import tied_names
from llmq.plan.block_shapes import Layout, block_ranges, counted, layout_of, layouts, random_blocks
from llmq.plan.disk import Disk, disks, output_bytes, packed_shapes
from llmq.plan.memory_model import Moment, block_moments, other_moments
from llmq.plan.microbenchmarks import speeds_of, token_seconds
from llmq.plan.time_model import Timed, all_seconds
from llmq.plan.workload import Workload, states_of, workload_of
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request
from llmq.run.trial import units_among

_PRODUCTS, _FEWEST = 5e10, 16  # the forward that is timed has at most these multiplications, at least these tokens


@dataclass(frozen=True)
class Plan:
    """What a run will do and need."""

    model: str
    weight_count: int  # of the whole model
    blocks: list[str]  # names of all blocks of the model
    layouts: list[Layout]
    bits: dict[str, int]  # bits of every linear of the blocks, by its name in the model
    in_float: list[str]  # tensors that stay in float, with the reason
    share: PackedShare  # of the blocks to quantize
    stored_as: str
    packed: tuple[int, int]  # weights that are packed, and the bytes they take
    output: int  # bytes of all tensors of the checkpoint
    text: str
    states: States
    processes: tuple[int, int]  # number of processes of the run, and of those on this machine
    device: str
    program: int  # bytes that the program takes already
    moments: list[Moment]  # what a process takes besides the program
    free: tuple[int, int]  # free bytes of the machine and of the device
    disks: list[Disk]
    seconds: dict[str, float] = field(default_factory=dict)  # seconds by kind of work; empty if nothing was timed
    probe: float = 0.0  # seconds that planning took
    busy: bool = False  # whether other programs were busy: they slow down the timed work, and the run

    @property
    def units(self) -> list[tuple[str, ...]]:
        """Return the names of the linears of each unit that must share its bits, in the order of the model."""
        layouts = {block: layout for layout in self.layouts for block in layout.blocks}
        return [
            tuple(f"{block}.{name}" for group in unit for name in group.linears)
            for block in self.blocks
            if block in layouts
            for unit in units_among(layouts[block].groups)
        ]

    @property
    def worst(self) -> Moment:
        """Return the moment that takes the most memory of the machine."""
        return max(self.moments, key=self.host_bytes)

    def host_bytes(self, moment: Moment) -> int:
        """Return the memory of the machine that a moment takes."""
        return moment.host + (moment.device if self.device == "cpu" else 0)

    @property
    def worst_on_device(self) -> Moment:
        """Return the moment that takes the most memory of the device."""
        return max(self.moments, key=lambda moment: moment.device)


def plan_of(request: Request, run: Run, timed: bool = False) -> Plan:
    """Return the plan of a run, without reading weights. `timed`: spend some seconds to estimate the time too."""
    states, source, program, clock = states_of(request, run), request.source, resident_now(), Clock()
    load = workload_of(request, run, states)
    free = free_memory(torch.device("cpu")), free_memory(request.compute.device)
    timings = _timed(request, run) if timed else None
    seen = timings[0] if timings else list(layouts(request, run))
    shapes = packed_shapes(seen)
    packed, plain = output_bytes(run, shapes)
    return Plan(
        model=f"{request.config.model} ({type(source.skeleton).__name__})",
        weight_count=source.size,
        blocks=source.block_names,
        layouts=seen,
        bits=run.bits,
        in_float=list(_in_float(run, seen)),
        share=packed_share(source.skeleton, run.chosen, shapes),
        stored_as=_format_of(run),
        packed=(sum(map(math.prod, shapes.values())), packed),
        output=packed + plain,
        text=_text_of(request, load),
        states=states,
        processes=(request.ranks.size, processes_here(request.ranks)),
        device=request.compute.device.type,
        program=program,
        moments=[*chain(*(block_moments(load, layout, run) for layout in seen)), *other_moments(request, run, load)],
        free=free,
        disks=disks(request, states, packed + plain),
        seconds=all_seconds(request, run, *timings, plain) if timings else {},
        probe=clock.total,
        busy=hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1),
    )


def _timed(request: Request, run: Run) -> tuple[list[Layout], Timed]:
    """Return the layouts, and how fast each kind of work is done.

    A block runs on one micro-batch, or on fewer tokens if the micro-batch has too many multiplications.
    """
    seen, tokens = list[Layout](), list[float]()
    experts = max((each.experts for each in modules_of_experts(request.source.skeleton).values()), default=0)
    weights = max(map(_used_weights, request.source.blocks))
    # With as many tokens as experts, each gets some: about 8, if a token goes to 8 of them.
    train, most = micro_batches(request.tokens.train)[0], max(_FEWEST, experts, int(_PRODUCTS / weights))
    train = train[:1, :most] if train.numel() > most else train
    for names, block in random_blocks(request, run, train):
        seen.append(layout_of(names, block, run))
        tokens.append(token_seconds(block))
    widest = max((columns for layout in seen for _, columns in layout.shapes.values()), default=0)
    return seen, Timed(speeds_of(run, widest, request.compute.factors), tokens)


def _used_weights(block: nn.Module) -> float:
    """Count the weights of a block that a token meets, as if it went to 8 experts of each module."""
    total = float(sum(parameter.numel() for parameter in block.parameters()))
    for name, layout in modules_of_experts(block).items():
        stacked = sum(parameter.numel() for parameter in block.get_submodule(name).parameters())
        total -= stacked * max(0, layout.experts - 8) / layout.experts
    return total


def _in_float(run: Run, seen: Iterable[Layout]) -> Iterator[str]:
    """Yield a line for each tensor, or kind of tensor, that is not packed, with the reason."""
    source, state = run.source, run.source.skeleton.state_dict()
    outer = [(name, "x".join(map(str, state[name].shape))) for name in source.outer_names() if state[name].ndim > 1]
    # The layers of a tower for pictures have the same tensors.
    for (name, shape), count in Counter((re.sub(r"\.\d+\.", ".*.", name), shape) for name, shape in outer).items():
        yield f"{name} ({shape}{f', {count} of them' if count > 1 else ''}): only the linears of blocks are packed"
    for name, other in sorted(tied_names(source.skeleton).items()):
        if name not in source.shared_names:
            yield f"{name}: it shares its weights with {other}"
    for layout in seen:
        blocks = block_ranges(source.block_names, layout.blocks)
        yield from counted(f"{name} of blocks {blocks}: {why}" for name, why in layout.skipped.items())
    if others := set(source.block_names) - set(run.chosen):
        yield f"blocks {block_ranges(source.block_names, others)}: not among --blocks {run.config.blocks}"
    yield "norms and biases"


def _format_of(run: Run) -> str:
    grid = run.grid
    size = "whole rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
    bits = ", ".join(map(str, sorted({run.bits[name] for name in run.bits if name.startswith(tuple(run.chosen))})))
    kind, dtype = "symmetric" if grid.symmetric else "with zero points", str(run.scale_dtype).removeprefix("torch.")
    return f"{run.config.stored_as}: {bits} bit, {size}, {kind}, scales in {dtype}"


def _text_of(request: Request, load: Workload) -> str:
    tokens, config = request.tokens, request.config
    if not load.statistics:
        return f"none: {config.method} looks only at the weights"
    train, held_out, length = tokens.train.numel(), tokens.held_out.numel(), tokens.train.shape[1]
    more = f", {request.training.train.numel():,} to train on from end to end" if config.end_to_end else ""
    return f"{config.calibration}: {train:,} tokens, {held_out:,} held out{more}, in sequences of {length}"
