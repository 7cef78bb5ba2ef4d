"""Memory of a run: that of the worst of a few moments, each the sum of its big terms.

For a block of Llama-2-7B and gptq:

    recording    embeddings in float32, beside them as they are stored                     0.8 GB
    statistics   H, H_val and the sum that grows, each with the target moment: 11008 wide  2.0 GB
    solving      H, H_val, a factor, the target moment, W and where it moves to            2.2 GB
    writing      packed tensors, and the copies that wait for their part                   0.2 GB

and besides the program itself, the block, hidden states, and what Block keeps for further runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from llmq.algorithms.awq import ROWS_PER_SEARCH
from llmq.calibration.kept_inputs import MOST_KEPT
from llmq.calibration.ordered_sums import shares_ahead
from llmq.calibration.self_generated import SELF
from llmq.models.block_structure import Group
from llmq.plan.block_shapes import Layout
from llmq.plan.workload import Workload
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request

END_TO_END = "training from end to end"
_SCRATCH = 50_000_000  # bytes that libraries take for themselves
_ACTIVATIONS = 6  # copies of a micro-batch, as wide as the widest linear, while a block runs
_STRIP = 1024  # rows looked at together by what is done strip by strip
_TRAINED = 25  # bytes for each weight that is trained: codes, gradients, two moments, the weight and its gradient


@dataclass(frozen=True)
class Moment:
    """Bytes that a process needs at some point, beside the program itself; on a CPU all of them are the host's."""

    what: str
    host: int = 0
    device: int = 0


def block_moments(load: Workload, layout: Layout, run: Run) -> Iterator[Moment]:
    """While a block is quantized."""
    weights = layout.numbers * load.stored + layout.others * load.others
    if run.algorithm.transform is not None:
        yield from _transform_moments(load, layout, weights)
        weights += layout.numbers * load.factors * (load.streams == 2)
    done: list[Group] = []
    for stage in load.stages(layout):
        last, numbers = len(done) + len(stage) == len(layout.groups), sum(layout.size(group) for group in done)
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
            beside = before + sum(posed[i + 1 :]) + sum(layout.size(solved) for solved in stage[:i])
            yield Moment(f"the solving of {_leaves([group])}", host, beside + _solving(load, layout, group, run))
        done += stage
    if run.refine is not None:
        posed = sum(8 * layout.square(g) + 4 * layout.size(g) for g in layout.groups)
        batch = run.config.tuned.batch * load.batch * sum(map(sum, layout.shapes.values())) * 4
        trained = sum(layout.size(group) for group in layout.groups) * (1 + _TRAINED)
        yield Moment("the training of a block", load.states, weights + trained + posed + batch)


def _transform_moments(load: Workload, layout: Layout, weights: int) -> Iterator[Moment]:
    """While a method changes a block, which takes the statistics of all its groups."""
    sums = sum(4 * load.sums * layout.square(g) + load.stored * layout.size(g) for g in layout.groups)
    yield Moment("the sums of all layers", load.states, weights + _running(load, layout, layout.groups) + sums)
    posed = sum(8 * layout.square(g) + 4 * layout.size(g) for g in layout.groups)
    rows = max(columns for _, columns in map(layout.shape, layout.groups)) * ROWS_PER_SEARCH if layout.groups else 0
    yield Moment("the search for scales", load.states, weights + posed + 3 * 4 * rows)


def kept_bytes(load: Workload, layout: Layout, done: list[Group], stage: list[Group], last: bool) -> int:
    """What a block keeps for its next run: what leaves its parts, and what enters the linear that ends the next one."""
    if not (load.sequential and load.statistics):
        return 0
    leaving = sum(layout.shape(group)[0] for group in done if group.ends)
    entering = sum(layout.shape(group)[1] for group in stage if group.ends)
    numbers = (leaving + entering) * (1 if last else load.streams)
    return min(MOST_KEPT, (load.tokens + load.held_out) * numbers * load.factors)


def _running(load: Workload, layout: Layout, groups: Sequence[Group]) -> int:
    """A micro-batch on its way to the last of these groups, and weights as matmuls want them."""
    widest = max((max(layout.shape(group)) for group in groups), default=0)
    copies = layout.numbers * load.factors if load.stored != load.factors else 0
    return _SCRATCH + load.batch * widest * 4 * _ACTIVATIONS + copies


def _sums(load: Workload, layout: Layout, group: Group) -> int:
    """Statistics of a group while they grow, or when they are finished if that is more."""
    (rows, columns), (target_moment, multiplied) = layout.shape(group), load.target_moment(layout, group)
    late = shares_ahead({"H": (columns, columns), "target_moment": (target_moment,)}, load.ranks)
    grow = 4 * (load.sums + late) * (columns**2 + target_moment)
    ready = 4 * (2 * columns**2 + 2 * target_moment + 3 * rows * columns) if multiplied and target_moment else 0
    return rows * columns * load.stored + max(grow, ready)


def _posed(load: Workload, layout: Layout, group: Group) -> int:
    """A problem that waits; weights of a single linear are the block's own if they are as wanted."""
    numbers, square = layout.size(group), layout.square(group)
    dtype = 4 if load.statistics else load.stored
    W = dtype * numbers * (len(group.linears) > 1 or dtype != load.stored)
    return W + 4 * (2 * square + 2 * numbers * (load.streams == 2)) if load.statistics else W


def _solving(load: Workload, layout: Layout, group: Group, run: Run) -> int:
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


def other_moments(request: Request, run: Run, load: Workload) -> Iterator[Moment]:
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
    whole = source.size
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
    return Moment(END_TO_END, device=original + learning + tokens * (3 * 4 * words + 4 * sides))


def _leaves(groups: Iterable[Group]) -> str:
    return " + ".join(name.rpartition(".")[2] for group in groups for name in group.linears)
