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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from llmq.algorithms.awq import ROWS_PER_SEARCH
from llmq.calibration.kept_inputs import MOST_KEPT
from llmq.calibration.ordered_sums import shares_ahead
from llmq.calibration.self_generated import SELF
from llmq.models.block_structure import Group
from llmq.models.decoder_blocks import decoder_of
from llmq.plan.block_shapes import Layout
from llmq.plan.workload import Workload
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request

END_TO_END = "training from end to end"
# Buffers that libraries (OpenMP, oneDNN, the allocator) take for themselves: an allowance, not derived.
_SCRATCH = 50_000_000
# Float32 tensors alive at once in a forward, each as wide as the widest linear. A Llama layer of 1024 x 2752 took 6.0
# at 2048 tokens (2026-11-28). "Widest" counts gate and up as one, so there is room for a factor of two.
_ACTIVATIONS = 6
# Rows that are rounded or moved together where that is done strip by strip (_ROWS in algorithms/).
_STRIP = 1024
# For each weight of a block in training: V, its gradient, two moments of Adam, the weight and its gradient (6 float32);
# the codes of the best state so far.
_TRAINED = 6 * 4 + 1
# In training from end to end: V, its gradient, two moments of Adam and the weight; V and the weight where codes stay.
_TRAINED_END, _TRAINED_END_SCALES = 5 * 4, 2 * 4
# Of a GGUF file, for each weight: its packed bytes (1 at most), then float32 before and after rows are permuted.
_READ_GGUF = 1 + 4 + 4
_CACHE = 512_000_000  # keys and values while the model writes text: _CACHE_BYTES of self_generated.py


@dataclass(frozen=True)
class Moment:
    """Bytes that a process needs at some point, besides the program itself; on a CPU the host has to give both."""

    what: str
    host: int = 0
    device: int = 0


def block_moments(load: Workload, layout: Layout, run: Run) -> Iterator[Moment]:
    """Yield the moments while one block is quantized, in order; the table at the top shows two of them."""
    weights = layout.weight_count * load.linear_bytes + layout.other_count * load.other_bytes
    if run.algorithm.transform is not None:
        yield from _transform_moments(load, layout, weights)
        weights += layout.weight_count * load.factor_bytes * (load.streams == 2)  # the original ones, kept
    solved: list[Group] = []
    for stage in load.stages(layout):
        last = len(solved) + len(stage) == len(layout.groups)
        host = load.states + kept_bytes(load, layout, solved, stage, last)
        codes = sum(map(layout.weights_of, solved))
        if load.statistics:
            original = codes * load.factor_bytes if load.streams == 2 else 0
            sums = _forward_bytes(load, layout, [*solved, *stage]) + sum(_sum_bytes(load, layout, g) for g in stage)
            yield Moment(f"the sums of {_leaves(stage)}", host, weights + codes + original + sums)
        # After the last sum of a block the original weights are freed.
        before = weights + codes + (codes * load.factor_bytes if load.streams == 2 and not last else 0)
        for i, group in enumerate(stage):
            waiting = sum(_problem_bytes(load, layout, other) for other in stage[i + 1 :])
            rounded = sum(map(layout.weights_of, stage[:i]))
            needed = before + waiting + rounded + _solving_bytes(load, layout, group, run)
            yield Moment(f"the solving of {_leaves([group])}", host, needed)
        solved += stage
    if run.refine is not None:
        # The way back needs the input and output of every linear, in float32.
        batch = run.config.tuned.batch * load.batch * sum(map(sum, layout.shapes.values())) * 4
        trained = sum(map(layout.weights_of, layout.groups)) * (1 + _TRAINED)  # 1: the codes before the training
        yield Moment("the training of a block", load.states, weights + trained + _all_problems(layout) + batch)


def _transform_moments(load: Workload, layout: Layout, weights: int) -> Iterator[Moment]:
    """Yield the moments while a method changes a block (awq): it takes the statistics of all groups at once."""
    sums = sum(4 * load.sums * layout.moment_size(g) + load.linear_bytes * layout.weights_of(g) for g in layout.groups)
    forward = _forward_bytes(load, layout, layout.groups)
    yield Moment("the sums of all layers", load.states, weights + forward + sums)
    widest = max((columns for _, columns in map(layout.shape, layout.groups)), default=0)
    tried = 3 * 4 * ROWS_PER_SEARCH * widest  # scaled rows, their rounded values and the difference
    yield Moment("the search for scales", load.states, weights + _all_problems(layout) + tried)


def _all_problems(layout: Layout) -> int:
    return sum(8 * layout.moment_size(group) + 4 * layout.weights_of(group) for group in layout.groups)


def kept_bytes(load: Workload, layout: Layout, solved: list[Group], stage: list[Group], last: bool) -> int:
    """Return what a block keeps for its next run, at most MOST_KEPT.

    Attention and MLP end with a linear: what enters it is kept while the linear is being solved, what leaves it after.
    """
    if not (load.sequential and load.statistics):
        return 0
    leaving = sum(layout.shape(group)[0] for group in solved if group.ends)
    entering = sum(layout.shape(group)[1] for group in stage if group.ends)
    width = (leaving + entering) * (1 if last else load.streams)
    return min(MOST_KEPT, (load.tokens + load.held_out) * width * load.factor_bytes)


def _forward_bytes(load: Workload, layout: Layout, groups: Sequence[Group]) -> int:
    """Return what a micro-batch needs up to these groups, with copies of weights in the dtype that matmuls want."""
    widest = max((max(layout.shape(group)) for group in groups), default=0)
    copies = layout.weight_count * load.factor_bytes if load.linear_bytes != load.factor_bytes else 0
    return _SCRATCH + load.batch * widest * 4 * _ACTIVATIONS + copies


def _sum_bytes(load: Workload, layout: Layout, group: Group) -> int:
    """Return the bytes of a group's statistics while they are summed, or when they are finished if that is more."""
    (rows, columns), (target_moment, multiplied) = layout.shape(group), load.target_moment(layout, group)
    late = shares_ahead({"H": (columns, columns), "target_moment": (target_moment,)}, load.ranks)
    growing = 4 * (load.sums + late) * (columns**2 + target_moment)
    # H and the sum for T, twice each; W in float32, and its product with the sum of either text.
    finished = 4 * (2 * columns**2 + 2 * target_moment + 3 * rows * columns) if multiplied and target_moment else 0
    return rows * columns * load.linear_bytes + max(growing, finished)


def _problem_bytes(load: Workload, layout: Layout, group: Group) -> int:
    """Return the bytes of a problem that waits: W, H twice and T twice.

    W of a single linear in the right dtype is the block's own weight and takes nothing more.
    """
    size, dtype = layout.weights_of(group), 4 if load.statistics else load.linear_bytes
    W = dtype * size * (len(group.linears) > 1 or dtype != load.linear_bytes)
    return W + 4 * (2 * layout.moment_size(group) + 2 * size * (load.streams == 2)) if load.statistics else W


def _solving_bytes(load: Workload, layout: Layout, group: Group, run: Run) -> int:
    """Return the bytes of a problem when its weights are moved, rounded or put back, whichever is most."""
    (rows, columns), problem = layout.shape(group), _problem_bytes(load, layout, group)
    size, square, strip = rows * columns, columns**2, 4 * _STRIP * columns
    if not load.statistics:
        return problem + size + strip
    moving = problem + 4 * (size + square) + strip if load.streams == 2 else 0  # the moved W, a factor of H
    # W, H twice and its factor; the rows being solved, transposed, and their errors; codes, transposed and not.
    rounding = 4 * (size + 3 * square + 2 * min(rows, load.rows_per_solve) * columns) + 2 * size
    if run.config.effort == "best" or run.config.gptq.passes:
        rounding += 3 * 4 * size  # coordinate descent: the rounded W, its error, and the error times H
    # W and its codes; one linear dequantized, then in the dtype of the block; H twice.
    back = 4 * size + size + size // len(group.linears) * (4 + load.linear_bytes) + 8 * square
    return max(moving, rounding, back)


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
    yield Moment("the recording of hidden states", first, inside * dtype)
    yield Moment("the writing of embeddings", read)
    last, sizes = source.block_names.index(run.chosen[-1]), set[tuple[int, bool, bool]]()
    for i, name in enumerate(source.block_names):
        count = sum(state[tensor].numel() for tensor in source.block_tensor_names(name))
        sizes.add((count, name in run.chosen, i < last))
    for count, is_chosen, text_passes in sorted(sizes):
        converted = count * dtype * (load.linear_bytes != stored)
        yield Moment("the reading of a block", load.states + count * stored, converted)
        if not is_chosen and text_passes:
            yield Moment("the writing of a block that stays", 2 * count * stored + load.states, count * dtype)
        if not is_chosen:
            yield Moment("the check of a block that stays", count * (stored + 4))
    if SELF in (config.calibration, config.tuned.end_text if config.end_to_end else ""):
        model = source.size * request.compute.precision.itemsize
        yield Moment("the writing of calibration text", device=model + _CACHE)
    if config.end_to_end:
        yield _training(request)


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
