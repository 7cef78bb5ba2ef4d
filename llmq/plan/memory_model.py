"""Estimates the peak memory of a run: the largest of a few moments. A moment is the sum of its large terms.

Terms of a group of linears that share an input (N rows together, K columns), in bytes:

    H        4 K²     second moment of the input in float32, once for calibration and once for held-out text
    T        4 N K    target moment, once for each text too; summed as 4 K² where that is less work
    W        4 N K    the group's weights as one float32 matrix
    codes    1 N K    the result

Example: a block of Llama-2-7B (202.4 million weights in linears, 8192 in norms), gptq, 8 samples of 512 tokens, weights
multiplied in bfloat16. Its largest moment is "the sums of down_proj" (N = 4096, K = 11008), in GB:

                                             summing H and T                  solving down_proj
    block, as loaded                  0.405  202.4 M x 2 + 8192 x 4    0.405
    codes of the other linears        0.157  157.3 M                   0.157
    their original weights            0.315  157.3 M x 2                      (freed after the last sum)
    hidden states, both models        0.134  2 x 4096 x 4096 x 4       0.134
    kept for the next run             0.124  4096 x (4096 + 11008) x 2 0.124
    one micro-batch and scratch       0.591  1024 x 22016 x 4 x 6 + 50 MB
    down_proj                         0.090  N K x 2                   0.180  W: 4 N K
    H and T                           1.995  3 sums of 4 (K² + N K)    1.330  2 of 4 (K² + N K)
    factor of H, moved W, a strip                                      0.710  4 (K² + N K) + 4 x 1024 K
    together                          3.811                            3.041

The program itself takes 0.45 GB more: 4.26 GB. A run of this shape took 3.77 GB at most (docs/scale.md, 2026-11-26).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn

from llmq.algorithms.awq import ROWS_PER_SEARCH
from llmq.algorithms.shrinkage import JUDGES
from llmq.calibration.ordered_sums import shares_ahead
from llmq.calibration.self_generated import SELF
from llmq.models.block_structure import Group
from llmq.models.decoder_blocks import decoder_of
from llmq.models.model_source import ModelSource
from llmq.plan.block_shapes import Layout
from llmq.plan.group_memory import forward_bytes, kept_bytes, problem_bytes, solving_bytes, sum_bytes
from llmq.plan.workload import Workload
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request
from llmq.run.sensitivity import streams_bytes

END_TO_END = "training from end to end"
# For each weight of a block in training: V, its gradient, two moments of Adam, the weight and its gradient (6 float32);
# the codes of the best state so far.
_TRAINED = 6 * 4 + 1
# In training from end to end: V, its gradient, two moments of Adam, and one byte for the scales of groups of 64; where
# codes stay, one byte for each, and one for the scales. A dense weight is made layer by layer.
_TRAINED_END, _TRAINED_END_SCALES = 4 * 4 + 1, 2
# Of a GGUF file, for each weight: its packed bytes (1 at most), then float32 before and after rows are permuted.
_READ_GGUF = 1 + 4 + 4
_BUSY = 4  # tokens that the busiest expert gets, in multiples of the mean: an allowance
_CACHE = 512_000_000  # keys and values while the model writes text: _CACHE_BYTES of self_generated.py


@dataclass(frozen=True)
class Moment:
    """Bytes that a process needs at some point, besides the program itself; on a CPU the host has to give both."""

    what: str
    host: int = 0
    device: int = 0


def block_moments(load: Workload, layout: Layout, run: Run) -> Iterator[Moment]:
    """Yield the moments while one block is quantized, in order; the table at the top shows two of them."""
    for moment in _block_moments(load, layout, run):
        yield replace(moment, device=moment.device + load.resident)


def _block_moments(load: Workload, layout: Layout, run: Run) -> Iterator[Moment]:
    weights = layout.weight_count * load.linear_bytes + layout.other_count * load.other_bytes
    if run.algorithm.transform is not None:
        yield from _transform_moments(load, layout, weights)
        weights += layout.weight_count * load.factor_bytes * (load.streams == 2)  # the original ones, kept
    solved: list[Group] = []
    for stage in load.stages(layout):
        last = len(solved) + len(stage) == len(layout.groups)
        if stage and stage[0].expert is not None:
            codes = sum(layout.weights_of(group) for group in solved if group.expert is None)
            kept = kept_bytes(load, layout, solved, stage, last)
            yield from _expert_moments(load, layout, run, stage, weights + codes + kept)
            solved += stage
            continue
        codes = sum(map(layout.weights_of, solved))
        kept = kept_bytes(load, layout, solved, stage, last)
        if load.statistics:
            original = codes * load.factor_bytes if load.streams == 2 else 0
            sums = forward_bytes(load, layout, [*solved, *stage]) + sum(sum_bytes(load, layout, g) for g in stage)
            yield Moment(f"the sums of {_leaves(stage)}", load.states, weights + kept + codes + original + sums)
        # After the last sum of a block the original weights are freed.
        before = weights + kept + codes + (codes * load.factor_bytes if load.streams == 2 and not last else 0)
        for i, group in enumerate(stage):
            waiting = sum(problem_bytes(load, layout, other) for other in stage[i + 1 :])
            rounded = sum(map(layout.weights_of, stage[:i]))
            needed = before + waiting + rounded + solving_bytes(load, layout, group, run)
            yield Moment(f"the solving of {_leaves([group])}", load.states, needed)
        solved += stage
    if run.refine is not None:
        # The way back needs the input and output of every linear, in float32.
        batch = run.config.tuned.batch * load.batch * sum(map(sum, layout.shapes.values())) * 4
        # 1: the codes before the training.
        trained = sum(layout.weights_of(group) for group in _usual(layout)) * (1 + _TRAINED)
        yield Moment("the training of a block", load.states, weights + trained + _all_problems(layout) + batch)


def _transform_moments(load: Workload, layout: Layout, weights: int) -> Iterator[Moment]:
    """Yield the moments while a method changes a block (awq): it takes the statistics of all groups at once."""
    groups = _usual(layout)
    sums = sum(4 * load.sums * layout.moment_size(g) + load.linear_bytes * layout.weights_of(g) for g in groups)
    forward = forward_bytes(load, layout, groups)
    yield Moment("the sums of all layers", load.states, weights + forward + sums)
    widest = max((columns for _, columns in map(layout.shape, groups)), default=0)
    tried = 3 * 4 * ROWS_PER_SEARCH * widest  # scaled rows, their rounded values and the difference
    yield Moment("the search for scales", load.states, weights + _all_problems(layout) + tried)


def _all_problems(layout: Layout) -> int:
    return sum(8 * layout.moment_size(group) + 4 * layout.weights_of(group) for group in _usual(layout))


def _usual(layout: Layout) -> list[Group]:
    return [group for group in layout.groups if group.expert is None]


def _expert_moments(load: Workload, layout: Layout, run: Run, stage: list[Group], weights: int) -> Iterator[Moment]:
    """Yield the moments while the experts of a module are quantized: first their common sums, then one after the other.

    What enters the experts is kept for both models, and what the rest of the block lacks. The codes of an expert are
    written as soon as it is solved.

    `weights`: bytes of the block's weights, of the other groups' codes, and of outputs kept for the block's last run.
    """
    before, after = stage[:2]  # of the first expert; the others have the same shapes
    (_, width), (_, inner) = layout.shape(before), layout.shape(after)
    number, own, tokens = len(stage) // 2, 0, load.tokens + load.held_out
    share = layout.share(before)
    busy = min(1.0, _BUSY * share)
    if run.config.expert_statistics == "all-tokens":
        share = busy = 1.0
    # Of each choice of a token: its row and its weight.
    choices = int(12 * tokens * share * number * load.statistics)
    host = load.states + (0 if load.resident else load.experts + choices)
    weights += load.resident_experts + choices if load.resident else 0
    if load.statistics:
        late = shares_ahead({"before": (width, width), "after": (inner, inner)}, load.ranks)
        sums = (load.sums + late) * 4 * (width**2 + inner**2)
        # Their outputs, each times its score; then the inputs of their last linears, in a list and together.
        routed = load.batch * share * number * 4 * (2 * width + 2 * inner)
        original = sum(map(layout.weights_of, _usual(layout))) * load.factor_bytes * (load.streams == 2)
        running = forward_bytes(load, layout, layout.groups) + int(routed)
        yield Moment("the sums of all experts", host, weights + original + sums + running)
        # H over all experts, twice. The rows of an expert in both models, their differences, and these weighted.
        own = 8 * (width**2 + inner**2) + int(4 * busy * tokens * (4 * width + 2 * inner))
        # Both moments of each judge; a mixture, its factor, a product, and the held-out moments in another order.
        judging = 8 * JUDGES * (width**2 + inner**2) + 16 * max(width, inner) ** 2
        yield Moment("the choice of what experts borrow", host, weights + own + judging)
    for group in (before, after):
        if load.statistics:
            yield Moment(
                f"the sums of an expert's {_leaves([group])}", host, weights + own + sum_bytes(load, layout, group)
            )
        solving = solving_bytes(load, layout, group, run)
        yield Moment(f"the solving of an expert's {_leaves([group])}", host, weights + own + solving)


def other_moments(request: Request, run: Run, load: Workload) -> Iterator[Moment]:
    """Yield the moments before, between and after the blocks that are quantized."""
    source, config = request.source, request.config
    state = source.skeleton.state_dict(keep_vars=True)
    outer = {name: state[name].numel() for name in source.outer_names()}
    decoder = {id(tensor) for tensor in decoder_of(source.skeleton).state_dict(keep_vars=True).values()}
    inside = sum(count for name, count in outer.items() if id(state[name]) in decoder)
    stored, dtype, largest = source.dtype.itemsize, request.compute.dtype.itemsize, max(outer.values(), default=0)
    read = largest * (_READ_GGUF if source.is_gguf else 2 * stored)  # 2: as it is read, and as it waits to be written
    yield Moment("the reading of embeddings", inside * stored + read - largest * stored)
    yield Moment("the embeddings", inside * stored, inside * dtype * (dtype != stored))
    first = (load.states - load.arguments) // load.streams + load.arguments  # both models begin with the same states
    yield Moment("the recording of hidden states", first, inside * dtype + load.resident // load.streams)
    yield Moment("the writing of embeddings", read)
    last, sizes = source.block_names.index(run.chosen[-1]), set[tuple[int, int, bool, bool]]()
    for i, name in enumerate(source.block_names):
        inside = source.block_tensor_names(name)
        count = sum(state[tensor].numel() for tensor in inside)
        sizes.add((count, _read_at_once(source, inside), name in run.chosen, i < last))
    for count, once, is_chosen, text_passes in sorted(sizes):
        loaded = dtype if load.linear_bytes != stored else stored
        yield Moment("the reading of a block", load.states + once, count * loaded + load.resident)
        if not is_chosen and text_passes:
            yield Moment(
                "the writing of a block that stays", 2 * count * stored + load.states, count * dtype + load.resident
            )
        if not is_chosen:
            yield Moment("the check of a block that stays", count * (stored + 4))
    if SELF in (config.calibration, config.tuned.end_text if config.end_to_end else ""):
        model = source.size * request.compute.precision.itemsize
        yield Moment("the writing of calibration text", device=model + _CACHE)
    if config.spending is not None:  # in float32 on a CPU: see calibration/predictions.py
        whole = sum(outer.values()) * (4 if request.compute.device.type == "cpu" else dtype)
        yield Moment("the losses of single layers", device=whole + streams_bytes(run, request.compute.dtype))
    if config.end_to_end:
        yield _training(request)


def _read_at_once(source: ModelSource, names: list[str]) -> int:
    """Return the bytes of the largest tensor in the files, such as that of all experts; others are read before, after.

    One of GGUF is unpacked on the way.
    """
    if source.is_gguf:
        state = source.skeleton.state_dict()
        return _READ_GGUF * max(state[name].numel() for name in names)
    return max(sum(map(source.files.stored.nbytes, source.files.stored_names(name))) for name in names)


def _training(request: Request) -> Moment:
    """Return the moment of training the whole model: see run/end_to_end.py."""
    tuned, source, whole = request.config.tuned, request.source, request.source.size
    linears = [m for block in source.blocks for m in block.modules() if isinstance(m, nn.Linear)]
    count, sides = sum(m.weight.numel() for m in linears), sum(m.in_features + m.out_features for m in linears)
    tokens, words = tuned.end_batch * request.training.train.shape[1], source.config.get_text_config().vocab_size
    original = whole * request.compute.dtype.itemsize
    learning = (whole - count) * 4 + count * (_TRAINED_END if tuned.end_rate else _TRAINED_END_SCALES)
    # Three copies of the logits; the input and output of every linear.
    return Moment(END_TO_END, device=original + learning + tokens * (3 * 4 * words + 4 * sides))


def _leaves(groups: Iterable[Group]) -> str:
    return " + ".join(name.rpartition(".")[2] for group in groups for name in group.linears)
