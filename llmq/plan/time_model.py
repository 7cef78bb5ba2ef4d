"""Estimates the time of a run: how often each unit of work is done, times the seconds it takes on this machine."""

from dataclasses import dataclass

from llmq.calibration.hidden_states import States
from llmq.models.block_structure import Group
from llmq.models.experts import DOWN
from llmq.plan.block_shapes import Layout
from llmq.plan.microbenchmarks import Speeds
from llmq.plan.workload import Workload, workload_of
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request

_DISK = 5e8  # bytes a second that a disk reads and writes: assumed, because a dry run writes nothing
_GGUF = 2e8  # weights a second that a GGUF file gives: assumed
_CHECKS = 6  # times that a training measures the loss on held-out text


@dataclass(frozen=True)
class Timed:
    """How fast this machine works."""

    speeds: Speeds
    tokens: list[float]  # seconds of a token in a block of each structure


def block_seconds(load: Workload, layout: Layout, token: float, run: Run, speeds: Speeds) -> dict[str, float]:
    """Estimate the seconds of one block by kind of work, from those of one `token` that passes the block."""
    tokens, seconds, rows_apart = load.tokens + load.held_out, dict[str, float](), run.algorithm.rows_apart(run.config)
    if load.statistics:
        seconds["forward"] = tokens * token * _passes(load, layout)
        product = token / layout.used_count  # of a multiplication in the dtype of the block
        seconds["statistics"] = sum(_sum_seconds(load, layout, group, product, speeds) for group in layout.groups)
        # What enters the last linears of experts is computed for the layer's sums, and for each expert in either model.
        first = layout.used([g for g in layout.groups if g.expert is not None and not g.linears[0].endswith(DOWN)])
        seconds["forward"] += tokens * first * product * (1 + load.streams)
        seconds["statistics"] += tokens * _layer_products(layout) * speeds.product
    seconds["solve"] = 0.0
    for group in layout.groups:
        rows, columns = layout.shape(group)
        seconds["solve"] += speeds.solving(rows / (run.ranks.size if rows_apart else 1), columns)
        if (
            run.algorithm.transform is not None and group.expert is None
        ):  # the search for scales tries every ratio on all rows
            tries = run.config.awq.ratios * rows * columns
            seconds["solve"] += tries * (columns * speeds.product + 8 * speeds.addition)
            seconds["statistics"] += tokens * columns**2 / 2 * speeds.moment
    if run.refine is not None:
        tuned, checks = run.config.tuned, min(_CHECKS, run.config.tuned.steps)
        # The forward and the way back take about 4 forwards; then some 20 operations on each weight.
        steps = tuned.steps * (4 * tuned.batch * load.batch * token + 20 * layout.weight_count * speeds.addition)
        seconds["training"] = steps + checks * load.held_out * token
    seconds["files"] = layout.weight_count * speeds.weight
    return seconds


def _passes(load: Workload, layout: Layout) -> float:
    """Estimate how often a block runs over the text; a run that ends at a group counts as a fraction.

    With kept inputs, each stream passes the block once and each last linear of attention and MLP once more. Without,
    every group needs a run up to it. Reality lies between: what exceeds `most_kept` is not kept.
    """
    runs, before = list[float](), 0.0
    for stage in load.stages(layout):
        inside = 0.0 if stage and stage[0].expert is not None else layout.used(stage[:-1])
        runs.append((before + inside) / layout.used_count)
        before += layout.used(stage)
    without = 1 + sum(runs) + (1 + sum(runs[:-1]) if load.streams == 2 else 0)
    if not load.sequential:
        return without
    last_linears = [group for group in layout.groups if group.ends]
    ends = layout.used(last_linears) / layout.used_count
    width = sum(layout.shape(group)[1] for group in last_linears)
    wanted = (load.tokens + load.held_out) * width * load.factor_bytes * load.streams
    share = min(1.0, load.most_kept / max(1, wanted))
    return share * (load.streams + ends) + (1 - share) * without


def _sum_seconds(load: Workload, layout: Layout, group: Group, product: float, speeds: Speeds) -> float:
    """Estimate the seconds of summing a group's statistics, from those of a `product` in the block's dtype."""
    (rows, columns), (target_moment, multiplied) = layout.shape(group), load.target_moment(layout, group)
    tokens = (load.tokens + load.held_out) * layout.share(group)
    square = speeds.moment if group.expert is None else speeds.product  # tokens of experts have weights, in float32
    seconds = tokens * (columns**2 / 2 * square + 8 * columns * speeds.addition)  # half of H; it is symmetric
    if target_moment:
        seconds += tokens * product * (columns**2 if multiplied else 2 * rows * columns)
        seconds += 2 * rows * columns**2 * speeds.product if multiplied else 0
    # About ten shares of the text, with three operations on the sums of each.
    return seconds + 10 * 3 * (columns**2 + target_moment) * speeds.addition


def _layer_products(layout: Layout) -> float:
    """Count the multiplications for each token in the sums of H over all experts of a module."""
    products = 0.0
    for group in layout.groups:
        if group.expert is not None and group.expert.number == 0:
            rows = layout.share(group) * _experts(layout, group.expert.module) if group.linears[0].endswith(DOWN) else 1
            products += rows * layout.moment_size(group) / 2
    return products


def _experts(layout: Layout, module: str) -> int:
    return 1 + max(group.expert.number for group in layout.groups if group.expert and group.expert.module == module)


def all_seconds(request: Request, run: Run, layouts: list[Layout], timed: Timed, plain: int) -> dict[str, float]:
    """Estimate the seconds of what is left of the run; `plain`: bytes that are written as they are."""
    source, speeds = request.source, timed.speeds
    total = {"opening": request.clock.seconds.get("open", 0.0)}
    load, done = workload_of(request, run, States(0, None)), {step.finished["finished"] for step in request.steps}
    for layout, token in zip(layouts, timed.tokens, strict=True):
        left = sum(block not in done for block in layout.blocks)
        for work, seconds in block_seconds(load, layout, token, run, speeds).items():
            total[work] = total.get(work, 0.0) + left * seconds
    names = source.block_names[: source.block_names.index(run.chosen[-1]) + 1]
    passed = sum(name not in run.chosen or name in done for name in names)
    if load.statistics:
        total["forward"] += passed * (load.tokens + load.held_out) * timed.tokens[0] * load.streams
    left = sum(name not in done for name in source.block_names) / len(source.block_names)
    stored = sum(path.stat().st_size for path in source.files.paths)
    reading = source.size / _GGUF if source.is_gguf else stored / _DISK
    # 3: written into parts, read, and written into shards.
    total["files"] += left * (reading + plain * (speeds.byte + 3 / _DISK))
    if request.config.end_to_end:
        total["training"] = _training_seconds(request, layouts[0].weight_count, timed)
    return total


def _training_seconds(request: Request, block_weights: int, timed: Timed) -> float:
    """Estimate the seconds of training from end to end."""
    tuned, text, depth = request.config.tuned, request.source.config.get_text_config(), len(request.source.blocks)
    token = depth * timed.tokens[0] + text.vocab_size * text.hidden_size * timed.speeds.product
    length, operations = request.training.train.shape[1], 20 if tuned.end_rate else 6
    # 4: a forward of the original, one of the student, and a way back of twice that; then operations on each weight.
    step = tuned.end_batch * length * 4 * token + depth * block_weights * operations * timed.speeds.addition
    return tuned.end_steps * step + _CHECKS * request.tokens.held_out.numel() * 2 * token
