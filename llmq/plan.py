"""What a run will do and need, said before it begins: layers, sizes, memory, disk and, for a dry run, time.

Memory is that of the worst of a few moments, each the sum of its big terms. For a block of Llama-2-7B and gptq:

    recording    embeddings in float32, beside them as they are stored                     0.8 GB
    statistics   H, H_val and the sum that grows, each with what outputs lack: 11008 wide  2.0 GB
    solving      H, H_val, a factor, what outputs lack, W and where it moves to            2.2 GB
    writing      packed tensors, and the copies that wait for their part                   0.2 GB

and besides the program itself, the block, hidden states, and what Block keeps for further runs.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from llmq.arch import Group
from llmq.block import _MOST_KEPT
from llmq.blockwise import Run
from llmq.clock import Clock
from llmq.errors import RequestError
from llmq.memory import free_memory, resident_peak
from llmq.probe import (
    Layout,
    Speeds,
    imagined_blocks,
    layout_of,
    layouts,
    linear_dtype,
    packed_bytes,
    speeds_of,
    token_seconds,
)
from llmq.request import Request
from llmq.sample import SELF
from llmq.shares import micro_batches, portion_of
from llmq.source import ModelSource, tied_aliases
from llmq.writer import unfinished_work

_MEMORY_SHARE = 0.25  # of what is free: hidden states that need more wait on disk
_SHARD = 5_000_000_000  # bytes of a checkpoint that the disk holds twice while its files are put together
_DISK = 5e8  # bytes a second that a disk is taken to read and write: a dry run writes nothing to find out
_PRODUCTS, _FEWEST = 5e10, 16  # multiplications of a forward that is timed; tokens
_GGUF = 2e8  # numbers a second that a GGUF file is taken to give
_SCRATCH = 50_000_000  # bytes that libraries take for themselves
_ACTIVATIONS = 6  # copies of a micro-batch, as wide as the widest linear, while a block runs
_STRIP = 1024  # rows looked at together by what is done strip by strip
_TRAINED = 25  # bytes for each weight that is trained: codes, gradients, two moments, the weight and its gradient
_LOOKS = 6  # at held-out text in a training
_END_TO_END = "training from end to end"


@dataclass(frozen=True)
class Moment:
    """Bytes that a process needs at some point, beside the program itself; on a CPU all of them are the host's."""

    what: str
    host: int = 0
    device: int = 0


@dataclass(frozen=True)
class Disk:
    """Bytes to be written to one file system."""

    path: Path
    what: str
    needed: int
    free: int


@dataclass(frozen=True)
class States:
    """Hidden states of this process while they wait."""

    nbytes: int
    directory: Path | None
    """None: in memory."""


@dataclass(frozen=True)
class Load:
    """What of a run, and of this process in it, decides how much memory and time a block takes."""

    tokens: int
    held_out: int
    batch: int
    """Tokens that run through a block together."""
    sums: int
    """Of one kind that are there at once: of the calibration tokens, the held-out ones, and one that grows."""
    streams: int
    """1, or 2 with the original model's."""
    stored: int
    """Bytes of a number of a linear, in a block that is loaded; then of one as matmuls want it, and of any other."""
    factors: int
    others: int
    sequential: bool
    statistics: bool
    states: int
    """Bytes of hidden states in memory."""
    together: int
    """Rows solved at once."""

    def stages(self, layout: Layout) -> list[list[Group]]:
        """Groups that are solved between two runs of the block."""
        return [[group] for group in layout.groups] if self.sequential else [list(layout.groups)]

    def lack(self, layout: Layout, group: Group) -> tuple[int, bool]:
        """Numbers of a sum of what the outputs of a group lack, and whether it still is to be multiplied by W."""
        rows, columns = layout.shape(group)
        narrow = group.residual is not None or 2 * rows < columns
        return ((rows if narrow else columns) * columns if self.streams == 2 else 0), not narrow


def load_of(request: Request, run: Run, states: States) -> Load:
    """That of this process."""
    portion, compute, tokens = portion_of(request.tokens, request.ranks), request.compute, request.tokens
    counts = [sum(share.held_out == kind for share in portion.shares) for kind in (False, True)]
    sizes = [batch.numel() for batch in portion.batches]
    return Load(
        tokens=sum(sizes[: portion.held_out_from]),
        held_out=sum(sizes[portion.held_out_from :]),
        batch=max(sizes, default=0),
        sums=max(min(2, counts[0]), 1 + min(2, counts[1])),
        streams=2 if run.matching and len(tokens.held_out) else 1,
        stored=linear_dtype(request, run).itemsize,
        factors=compute.factors.itemsize,
        others=compute.dtype.itemsize,
        sequential=run.sequential,
        statistics=run.algorithm.needs_statistics(run.config),
        states=0 if states.directory is not None else states.nbytes,
        together=4096 if compute.device.type == "cpu" else 1 << 30,
    )


def states_of(request: Request, run: Run) -> States:
    """How large the hidden states of this process are, and where they wait."""
    config, ranks = request.config, request.ranks
    tokens = request.tokens.train.numel() + request.tokens.held_out.numel()
    size = tokens * request.source.config.get_text_config().hidden_size * request.compute.dtype.itemsize
    size = size * (2 if run.matching else 1) // ranks.size
    free = free_memory(torch.device("cpu"))
    if config.offload_dir is None and (free is None or size <= _MEMORY_SHARE * free):
        return States(size, None)
    which = hashlib.sha256(str(config.output.resolve()).encode()).hexdigest()[:12]
    parent = config.offload_dir or unfinished_work(config.output)
    return States(size, parent / f"llmq-{which}-{ranks.rank}.partial")


# ---- memory


def block_moments(load: Load, layout: Layout, run: Run) -> Iterator[Moment]:
    """While a block is quantized."""
    weights = layout.numbers * load.stored + layout.others * load.others
    if run.algorithm.transform is not None:
        yield from _transform_moments(load, layout, weights)
        weights += layout.numbers * load.factors * (load.streams == 2)
    done: list[Group] = []
    for stage in load.stages(layout):
        last, numbers = len(done) + len(stage) == len(layout.groups), sum(_size(layout, group) for group in done)
        host = load.states + kept_bytes(load, layout, done, stage, last)
        # The codes of the groups before, and the weights that the original model computes with.
        before = weights + numbers + (numbers * load.factors if load.streams == 2 else 0)
        if load.statistics:
            sums = _running(load, layout, [*done, *stage]) + sum(_sums(load, layout, group) for group in stage)
            yield Moment(f"the sums of {_leaves(stage)}", host, before + sums)
        if last:
            before = weights + numbers
        posed = [_posed(load, layout, group) for group in stage]
        for i, group in enumerate(stage):
            beside = before + sum(posed[i + 1 :]) + sum(_size(layout, solved) for solved in stage[:i])
            yield Moment(f"the solving of {_leaves([group])}", host, beside + _solving(load, layout, group, run))
        done += stage
    if run.refine is not None:
        posed = sum(8 * _square(layout, g) + 4 * _size(layout, g) for g in layout.groups)
        batch = run.config.tuned.batch * load.batch * sum(map(sum, layout.shapes.values())) * 4
        trained = sum(_size(layout, group) for group in layout.groups) * (1 + _TRAINED)
        yield Moment("the training of a block", load.states, weights + trained + posed + batch)


def _transform_moments(load: Load, layout: Layout, weights: int) -> Iterator[Moment]:
    """While a method changes a block, which takes the statistics of all its groups."""
    sums = sum(4 * load.sums * _square(layout, g) + load.stored * _size(layout, g) for g in layout.groups)
    yield Moment("the sums of all layers", load.states, weights + _running(load, layout, layout.groups) + sums)
    posed = sum(8 * _square(layout, g) + 4 * _size(layout, g) for g in layout.groups)
    rows = max(columns for _, columns in map(layout.shape, layout.groups)) * 4096 if layout.groups else 0
    yield Moment("the search for scales", load.states, weights + posed + 3 * 4 * rows)


def kept_bytes(load: Load, layout: Layout, done: list[Group], stage: list[Group], last: bool) -> int:
    """What a block keeps for its next run: what leaves its parts, and what enters the linear that ends the next one."""
    if not (load.sequential and load.statistics):
        return 0
    leaving = sum(layout.shape(group)[0] for group in done if group.ends)
    entering = sum(layout.shape(group)[1] for group in stage if group.ends)
    numbers = (leaving + entering) * (1 if last else load.streams)
    return min(_MOST_KEPT, (load.tokens + load.held_out) * numbers * load.factors)


def _running(load: Load, layout: Layout, groups: Sequence[Group]) -> int:
    """A micro-batch on its way to the last of these groups, and weights as matmuls want them."""
    widest = max((max(layout.shape(group)) for group in groups), default=0)
    copies = layout.numbers * load.factors if load.stored != load.factors else 0
    return _SCRATCH + load.batch * widest * 4 * _ACTIVATIONS + copies


def _sums(load: Load, layout: Layout, group: Group) -> int:
    """Statistics of a group while they grow, or when they are finished if that is more."""
    (rows, columns), (lack, multiplied) = layout.shape(group), load.lack(layout, group)
    grow = 4 * load.sums * (columns**2 + lack)
    ready = 4 * (2 * columns**2 + 2 * lack + 3 * rows * columns) if multiplied and lack else 0
    return rows * columns * load.stored + max(grow, ready)


def _posed(load: Load, layout: Layout, group: Group) -> int:
    """A problem that waits; weights of a single linear are the block's own if they are as wanted."""
    numbers, square = _size(layout, group), _square(layout, group)
    dtype = 4 if load.statistics else load.stored
    W = dtype * numbers * (len(group.linears) > 1 or dtype != load.stored)
    return W + 4 * (2 * square + 2 * numbers * (load.streams == 2)) if load.statistics else W


def _solving(load: Load, layout: Layout, group: Group, run: Run) -> int:
    """A problem while it is solved: when the weights move, when they are rounded, or when they are put back."""
    (rows, columns), posed = layout.shape(group), _posed(load, layout, group)
    numbers, square, strip = rows * columns, columns**2, 4 * _STRIP * columns
    if not load.statistics:
        return posed + numbers + strip
    back = 4 * numbers + numbers + numbers // len(group.linears) * (4 + load.stored) + 8 * square
    moving = posed + 4 * (numbers + square) + strip if load.streams == 2 else 0
    rounding = 4 * (numbers + 3 * square + 2 * min(rows, load.together) * columns) + 2 * numbers
    if run.config.effort == "best" or run.config.gptq.passes:
        rounding += 4 * 3 * numbers  # what the columns are looked at again with
    return max(back, moving, rounding)


def _square(layout: Layout, group: Group) -> int:
    return layout.shape(group)[1] ** 2


def _size(layout: Layout, group: Group) -> int:
    return math.prod(layout.shape(group))


def _leaves(groups: Iterable[Group]) -> str:
    return " + ".join(name.rpartition(".")[2] for group in groups for name in group.linears)


def other_moments(request: Request, run: Run, load: Load) -> Iterator[Moment]:
    """Before, between and after the blocks that are quantized."""
    source, config = request.source, request.config
    state = source.skeleton.state_dict(keep_vars=True)
    outer = {name: state[name].numel() for name in source.outer_names()}
    decoder = {id(tensor) for tensor in source.skeleton.get_decoder().state_dict(keep_vars=True).values()}
    inside = sum(count for name, count in outer.items() if id(state[name]) in decoder)
    stored, dtype, largest = source.dtype.itemsize, request.compute.dtype.itemsize, max(outer.values(), default=0)
    looked_at = largest * (9 if source.is_gguf else 2 * stored)  # as they are read, or wait to be written
    yield Moment("the reading of embeddings", inside * stored + looked_at - largest * stored)
    yield Moment("the embeddings", inside * stored, inside * dtype * (dtype != stored))
    yield Moment("the recording of hidden states", load.states // load.streams, inside * dtype)
    yield Moment("the writing of embeddings", looked_at)
    last, sizes = source.block_names.index(run.chosen[-1]), set[tuple[int, bool, bool]]()
    for i, name in enumerate(source.block_names):
        numbers = sum(state[each].numel() for each in source.block_tensor_names(name))
        sizes.add((numbers, name in run.chosen, i < last))
    for numbers, is_chosen, comes_by in sorted(sizes):
        yield Moment(
            "the reading of a block", load.states + numbers * stored, numbers * dtype * (load.stored != stored)
        )
        if not is_chosen and comes_by:
            yield Moment("the writing of a block that stays", 2 * numbers * stored + load.states, numbers * dtype)
        if not is_chosen:
            yield Moment("the check of a block that stays", numbers * (stored + 4))
    whole = _numbers(source)
    if SELF in (config.calibration, config.tuned.end_text if config.end_to_end else ""):
        yield Moment("the writing of calibration text", device=whole * request.compute.precision.itemsize + 512_000_000)
    if config.end_to_end:
        yield _training(request, whole)


def _training(request: Request, whole: int) -> Moment:
    """The whole model while it is trained: see distill.py."""
    tuned, source = request.config.tuned, request.source
    linears = [m for block in source.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    numbers, sides = sum(m.weight.numel() for m in linears), sum(m.in_features + m.out_features for m in linears)
    tokens = tuned.end_batch * request.training.train.shape[1]
    words = source.config.get_text_config().vocab_size
    original = whole * request.compute.dtype.itemsize
    learning = (whole - numbers) * 4 + numbers * (20 if tuned.end_rate else 8)
    return Moment(_END_TO_END, device=original + learning + tokens * (3 * 4 * words + 4 * sides))


# ---- bytes on disk


def packed_shapes(found: Iterable[Layout]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every linear that is to be packed, by its name in the model."""
    return {
        f"{block}.{name}": layout.shapes[name]
        for layout in found
        for block in layout.blocks
        for group in layout.groups
        for name in group.linears
    }


def output_bytes(run: Run, shapes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Of the tensors to be written: the packed ones, and those that stay as they are."""
    state, known = run.source.skeleton.state_dict(), dict[tuple[tuple[int, int], int], int]()
    for name, shape in shapes.items():
        if (shape, run.bits[name]) not in known:
            known[shape, run.bits[name]] = packed_bytes(run, shape, run.bits[name])
    plain = [name for name in run.source.tensor_names if name.removesuffix(".weight") not in shapes]
    return (
        sum(known[shape, run.bits[name]] for name, shape in shapes.items()),
        sum(state[name].numel() * run.source.files.dtype(name).itemsize for name in plain),
    )


def disks(request: Request, states: States, output: int) -> list[Disk]:
    """What is to be written where, without what is there already or will make room."""
    config, local = request.config, _local(request)
    twice = 2 if config.end_to_end else 1  # what was made block by block stays until the training is done
    needed = [(config.output, "the checkpoint", twice * output + min(output, _SHARD) - _there(request))]
    if states.directory is not None:
        there = sum(path.stat().st_size for path in states.directory.glob("*.states"))
        needed.append((states.directory, "hidden states", local * max(0, 2 * states.nbytes - there)))
    found: dict[int, Disk] = {}
    for path, what, size in needed:
        parent = next(each for each in (path, *path.absolute().parents) if each.exists())
        disk = found.get(parent.stat().st_dev, Disk(path, "", 0, shutil.disk_usage(parent).free))
        what = " and ".join(filter(None, (disk.what, what)))
        found[parent.stat().st_dev] = Disk(disk.path, what, disk.needed + max(0, size), disk.free)
    return list(found.values())


def _there(request: Request) -> int:
    """Bytes of an earlier run in the output directory that this one goes on with, or replaces."""
    output, config = request.config.output, request.config
    if not (config.overwrite or config.resume) or not output.is_dir():
        return 0
    replaced = [*output.glob("model*.safetensors")] if config.overwrite else []
    files = [*replaced, *output.glob("*.partial/**/*.safetensors")]
    return sum(path.stat().st_size for path in files)


# ---- time


def block_seconds(load: Load, layout: Layout, token: float, run: Run, speeds: Speeds) -> dict[str, float]:
    """Of one block, by what is done. `token`: seconds of one that goes through it."""
    tokens, found, apart = load.tokens + load.held_out, dict[str, float](), run.algorithm.rows_apart(run.config)
    if load.statistics:
        found["forward"] = tokens * token * _passes(load, layout)
        factor = token / max(1, layout.numbers)
        found["statistics"] = sum(_sum_seconds(load, layout, group, factor, speeds) for group in layout.groups)
    found["solve"] = 0.0
    for group in layout.groups:
        rows, columns = layout.shape(group)
        found["solve"] += speeds.solving(rows / (run.ranks.size if apart else 1), columns)
        if run.algorithm.transform is not None:  # the search for scales: every ratio is tried on all rows
            tries = run.config.awq.ratios * rows * columns
            found["solve"] += tries * (columns * speeds.product + 8 * speeds.number)
            found["statistics"] += tokens * columns**2 / 2 * speeds.product
    if run.refine is not None:
        tuned, looks = run.config.tuned, min(_LOOKS, run.config.tuned.steps)
        steps = tuned.steps * (4 * tuned.batch * load.batch * token + 20 * layout.numbers * speeds.number)
        found["training"] = steps + looks * load.held_out * token
    found["files"] = layout.numbers * speeds.weight
    return found


def _passes(load: Load, layout: Layout) -> float:
    """How often a block is run, whole or in part."""
    sizes = [_size(layout, group) for group in layout.groups]
    before = [sum(sizes[:i]) / max(1, layout.numbers) for i in range(len(sizes))]
    once = [before[-1]] if not load.sequential and sizes else before
    ends = sum(_size(layout, group) for group in layout.groups if group.ends) / max(1, layout.numbers)
    again = 1 + sum(once) + (1 + sum(once[:-1]) if load.streams == 2 else 0)
    if not load.sequential:
        return again
    ends_in = sum(layout.shape(group)[1] for group in layout.groups if group.ends)
    wanted = (load.tokens + load.held_out) * ends_in * load.factors * load.streams
    share = min(1.0, _MOST_KEPT / max(1, wanted))
    return share * (load.streams + ends) + (1 - share) * again


def _sum_seconds(load: Load, layout: Layout, group: Group, factor: float, speeds: Speeds) -> float:
    """Sums over all tokens, and those of the shares. `factor`: seconds of a multiplication as blocks do them."""
    (rows, columns), (lack, multiplied) = layout.shape(group), load.lack(layout, group)
    tokens = load.tokens + load.held_out
    sums = tokens * (columns**2 / 2 * speeds.product + 8 * columns * speeds.number)
    if lack:
        sums += tokens * factor * (columns**2 if multiplied else 2 * rows * columns)
        sums += 2 * rows * columns**2 * speeds.product if multiplied else 0
    return sums + 10 * 3 * (columns**2 + lack) * speeds.number


@dataclass(frozen=True)
class Timed:
    """How fast work is done here."""

    speeds: Speeds
    tokens: list[float]
    """Seconds of a token in a block of each structure."""


def all_seconds(request: Request, run: Run, found: list[Layout], timed: Timed, plain: int) -> dict[str, float]:
    """Of the whole run, but for what is done already. `plain`: bytes that are written as they are."""
    source, speeds = request.source, timed.speeds
    total = {"opening": request.clock.seconds.get("open", 0.0)}
    load, done = load_of(request, run, States(0, None)), {step.finished["finished"] for step in request.steps}
    for layout, token in zip(found, timed.tokens, strict=True):
        left = sum(block not in done for block in layout.blocks)
        for what, seconds in block_seconds(load, layout, token, run, speeds).items():
            total[what] = total.get(what, 0.0) + left * seconds
    names = source.block_names[: source.block_names.index(run.chosen[-1]) + 1]
    passed = sum(name not in run.chosen or name in done for name in names)
    if load.statistics:
        total["forward"] += passed * (load.tokens + load.held_out) * timed.tokens[0] * load.streams
    left = sum(name not in done for name in source.block_names) / len(source.block_names)
    stored = sum(path.stat().st_size for path in source.files.paths)
    reading = _numbers(source) / _GGUF if source.is_gguf else stored / _DISK
    total["files"] += left * (reading + plain * (speeds.byte + 3 / _DISK))
    if request.config.end_to_end:
        total["training"] = _training_seconds(request, found[0].numbers, timed)
    return total


def _training_seconds(request: Request, numbers: int, timed: Timed) -> float:
    """Training from end to end: the original forward, the student forward and back."""
    tuned, text, depth = request.config.tuned, request.source.config.get_text_config(), len(request.source.blocks)
    token = depth * timed.tokens[0] + text.vocab_size * text.hidden_size * timed.speeds.product
    length, each = request.training.train.shape[1], 20 if tuned.end_rate else 6
    step = tuned.end_batch * length * 4 * token + depth * numbers * each * timed.speeds.number
    return tuned.end_steps * step + _LOOKS * request.tokens.held_out.numel() * 2 * token


# ---- the plan


@dataclass(frozen=True)
class Plan:
    """What a run will do and need."""

    model: str
    numbers: int
    """Weights of the model."""
    blocks: list[str]
    """All of the model, by name."""
    layouts: list[Layout]
    bits: dict[str, int]
    """Of every linear of the blocks, by its name in the model."""
    in_float: list[str]
    """What stays in float, and why."""
    stored_as: str
    packed: tuple[int, int]
    """Weights that are packed, and the bytes they take."""
    output: int
    """Bytes of all tensors."""
    text: str
    states: States
    processes: tuple[int, int]
    """Of the run, and those on this machine."""
    device: str
    program: int
    """Bytes that the program has already."""
    moments: list[Moment]
    """What a process takes beside them."""
    free: tuple[int | None, int | None]
    """Bytes on the machine and on the device; None where nobody says."""
    disks: list[Disk]
    seconds: dict[str, float] = field(default_factory=dict)
    """By what is done; empty where nothing was timed."""
    probe: float = 0.0
    """Seconds that this took."""
    busy: bool = False
    """Whether other programs slowed it, as they would the run."""

    @property
    def worst(self) -> Moment:
        """The moment that takes the most memory of the machine."""
        return max(self.moments, key=self.host_bytes)

    def host_bytes(self, moment: Moment) -> int:
        """Memory of the machine that a moment takes."""
        return moment.host + (moment.device if self.device == "cpu" else 0)

    @property
    def worst_on_device(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.device)


def plan_of(request: Request, run: Run, timed: bool = False) -> Plan:
    """The plan of a run. Reads no weights.

    Args:
        timed: also estimate how long it takes, from work on random numbers: some seconds.
    """
    states, source, program, clock = states_of(request, run), request.source, _resident(), Clock()
    load = load_of(request, run, states)
    free = free_memory(torch.device("cpu")), free_memory(request.compute.device)
    probed = _probed(request, run) if timed else None
    found = probed[0] if probed else list(layouts(request, run))
    shapes = packed_shapes(found)
    packed, plain = output_bytes(run, shapes)
    return Plan(
        model=f"{request.config.model} ({type(source.skeleton).__name__})",
        numbers=_numbers(source),
        blocks=source.block_names,
        layouts=found,
        bits=run.bits,
        in_float=list(_in_float(run, found)),
        stored_as=_format_of(run),
        packed=(sum(map(math.prod, shapes.values())), packed),
        output=packed + plain,
        text=_text_of(request, load),
        states=states,
        processes=(request.ranks.size, _local(request)),
        device=request.compute.device.type,
        program=program,
        moments=[
            *(moment for layout in found for moment in block_moments(load, layout, run)),
            *other_moments(request, run, load),
        ],
        free=free,
        disks=disks(request, states, packed + plain),
        seconds=all_seconds(request, run, *probed, plain) if probed else {},
        probe=clock.total,
        busy=hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1),
    )


def _probed(request: Request, run: Run) -> tuple[list[Layout], Timed]:
    """Every structure, and how fast its work is done: it sees a micro-batch, or a part of one if it is large."""
    found, tokens = list[Layout](), list[float]()
    numbers = max(sum(p.numel() for p in block.parameters()) for block in request.source.blocks)
    train, most = micro_batches(request.tokens.train)[0], max(_FEWEST, int(_PRODUCTS / numbers))
    train = train[:1, :most] if train.numel() > most else train
    for names, block in imagined_blocks(request, run, train):
        found.append(layout_of(names, block))
        tokens.append(token_seconds(block))
    widest = max((columns for layout in found for _, columns in layout.shapes.values()), default=0)
    return found, Timed(speeds_of(run, widest), tokens)


def _in_float(run: Run, found: Iterable[Layout]) -> Iterator[str]:
    """What is not packed, with the reason."""
    source, state = run.source, run.source.skeleton.state_dict()
    for name in source.outer_names():
        if state[name].ndim > 1:
            why = "the blocks' linears alone are packed"
            yield f"{name} ({'x'.join(map(str, state[name].shape))}): {why}"
    for name in sorted(tied_aliases(source.skeleton)):
        yield f"{name}: the embeddings once more"
    for layout in found:
        for name, why in layout.skipped.items():
            yield f"{name} of blocks {numbers_of(source.block_names, layout.blocks)}: {why}"
    if others := set(source.block_names) - set(run.chosen):
        yield f"blocks {numbers_of(source.block_names, others)}: not among --blocks {run.config.blocks}"
    yield "norms and biases"


def _format_of(run: Run) -> str:
    grid = run.grid
    size = "whole rows" if grid.group_size == -1 else f"groups of {grid.group_size}"
    bits = ", ".join(map(str, sorted({run.bits[name] for name in run.bits if name.startswith(tuple(run.chosen))})))
    kind = "symmetric" if grid.symmetric else "with zero points"
    return f"{run.config.stored_as}: {bits} bit, {size}, {kind}, scales in {_name(run.scale_dtype)}"


def _text_of(request: Request, load: Load) -> str:
    tokens, config = request.tokens, request.config
    if not load.statistics:
        return f"none: {config.method} looks at the weights alone"
    train, held_out, length = tokens.train.numel(), tokens.held_out.numel(), tokens.train.shape[1]
    more = f", {request.training.train.numel():,} to train on from end to end" if config.end_to_end else ""
    return f"{config.calibration}: {train:,} tokens, {held_out:,} held out{more}, in sequences of {length}"


def _numbers(source: ModelSource) -> int:
    """Of the model, each stored once."""
    state = source.skeleton.state_dict()
    return sum(state[name].numel() for name in source.tensor_names)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _local(request: Request) -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", request.ranks.size))


def _resident() -> int:
    """Bytes of memory that this process has now, or had at most where the system does not say."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])
    return resident_peak()


def check_plan(plan: Plan) -> None:
    """Raise RequestError if disks or memory do not suffice for what is planned."""
    for disk in plan.disks:
        if disk.needed > disk.free:
            states = disk.what == "hidden states"
            way = "name another --offload-dir, or fewer --samples" if states else "choose another --output"
            raise RequestError(
                f"{disk.what} need {_gb(disk.needed)} in {disk.path}, but {_gb(disk.free)} are free there.\n"
                f"Make room, or {way}."
            )
    (host, device), local, less = plan.free, plan.processes[1], "use fewer --samples, or a machine with more"
    worst, needed = plan.worst, local * plan.host_bytes(plan.worst)
    if host is not None and needed > host:
        states = local * plan.states.nbytes * (plan.states.directory is None)
        way = f"--offload-dir keeps {_gb(states)} of hidden states on disk" if states > needed - host else less
        raise RequestError(
            f"{worst.what} will take {_gb(needed)} of memory{_per(local)}, but {_gb(host)} are free.\n"
            f"Close other programs; {_less_training(worst) or way}."
        )
    if plan.device != "cpu" and device is not None and plan.worst_on_device.device > device:
        worst = plan.worst_on_device
        raise RequestError(
            f"{worst.what} will take {_gb(worst.device)} of the {plan.device} device, but {_gb(device)} are free.\n"
            f"--device cpu has other memory; {_less_training(worst) or less}."
        )


def _less_training(moment: Moment) -> str:
    if moment.what != _END_TO_END:
        return ""
    return "--tuned.end-rate 0 needs less; --tuned.end-steps 0 --tuned.steps 100 trains one block after the other"


def _per(processes: int) -> str:
    return f" for {processes} processes" if processes > 1 else ""


# ---- in words


def lines(plan: Plan) -> Iterator[str]:
    """The plan as a person reads it."""
    packed, nbytes = plan.packed
    yield f"model     {plan.model}, {plan.numbers / 1e6:,.1f} million weights"
    chosen = [name for layout in plan.layouts for name in layout.blocks]
    yield f"blocks    {len(plan.blocks)}, of which {len(chosen)} are quantized: {numbers_of(plan.blocks, chosen)}"
    for layout in plan.layouts:
        yield f"          each of {numbers_of(plan.blocks, layout.blocks)}:"
        for group in layout.groups:
            shapes = [f"{name} {'x'.join(map(str, layout.shapes[name]))}" for name in group.linears]
            bits = plan.bits[f"{layout.blocks[0]}.{group.linears[0]}"]
            yield f"            {' + '.join(shapes)}, {bits} bit"
    for i, each in enumerate(plan.in_float):
        yield f"{'' if i else 'in float':<10}{each}"
    yield f"format    {plan.stored_as}"
    whole = 8 * plan.output / plan.numbers
    yield f"bits      {8 * nbytes / max(1, packed):.2f} for each packed weight, {whole:.2f} of the whole model"
    yield f"output    {_gb(plan.output)}"
    yield f"text      {plan.text}"
    yield from _needs(plan)
    if plan.seconds:
        parts = ", ".join(f"{what} {_time(seconds)}" for what, seconds in plan.seconds.items() if seconds >= 1)
        yield f"time      about {_time(sum(plan.seconds.values()))} ({parts or 'moments'})"
        busy = "; other programs are at work, which makes it longer" if plan.busy else ""
        yield f"          estimated in {plan.probe:.1f} s from work on random numbers in a block of each kind{busy}"


def _needs(plan: Plan) -> Iterator[str]:
    """Memory and disk."""
    each = " for each of the processes" if plan.processes[0] > 1 else ""
    where = "in memory" if plan.states.directory is None else f"on disk, in {plan.states.directory.parent}"
    yield f"states    {_gb(plan.states.nbytes)} of hidden states{each} wait {where}"
    peak, (host, device) = plan.program + plan.host_bytes(plan.worst), plan.free
    free = "" if host is None else f"; {_gb(host)} are free"
    yield f"memory    {_gb(peak)} at most{each}, for {plan.worst.what}{free}"
    if plan.device != "cpu":
        free = "" if device is None else f"; {_gb(device)} are free"
        worst = plan.worst_on_device
        yield f"          {_gb(worst.device)} at most on the {plan.device} device, for {worst.what}{free}"
    for disk in plan.disks:
        yield f"disk      {_gb(disk.needed)} for {disk.what} in {disk.path}; {_gb(disk.free)} are free"


def numbers_of(blocks: Sequence[str], some: Container[str]) -> str:
    """Which of the blocks these are, as 0-2,5."""
    numbers = [i for i, name in enumerate(blocks) if name in some]
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
