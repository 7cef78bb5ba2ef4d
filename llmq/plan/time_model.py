"""Time of a run, from how often each unit of work is done and how long it takes here."""

from __future__ import annotations

from dataclasses import dataclass

from llmq.calibration.kept_inputs import MOST_KEPT
from llmq.plan.block_shapes import Layout
from llmq.plan.microbenchmarks import Speeds
from llmq.plan.workload import States, Workload, workload_of
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request

_DISK = 5e8  # bytes a second that a disk is taken to read and write: a dry run writes nothing to find out
_GGUF = 2e8  # numbers a second that a GGUF file is taken to give
_LOOKS = 6  # at held-out text in a training


@dataclass(frozen=True)
class Timed:
    """How fast work is done here."""

    speeds: Speeds
    tokens: list[float]
    """Seconds of a token in a block of each structure."""


def block_seconds(load: Workload, layout: Layout, token: float, run: Run, speeds: Speeds) -> dict[str, float]:
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


def _passes(load: Workload, layout: Layout) -> float:
    """How often a block is run, whole or in part."""
    sizes = [layout.size(group) for group in layout.groups]
    before = [sum(sizes[:i]) / max(1, layout.numbers) for i in range(len(sizes))]
    once = [before[-1]] if not load.sequential and sizes else before
    ends = sum(layout.size(group) for group in layout.groups if group.ends) / max(1, layout.numbers)
    again = 1 + sum(once) + (1 + sum(once[:-1]) if load.streams == 2 else 0)
    if not load.sequential:
        return again
    ends_in = sum(layout.shape(group)[1] for group in layout.groups if group.ends)
    wanted = (load.tokens + load.held_out) * ends_in * load.factors * load.streams
    share = min(1.0, MOST_KEPT / max(1, wanted))
    return share * (load.streams + ends) + (1 - share) * again


def _sum_seconds(load: Workload, layout: Layout, group: Group, factor: float, speeds: Speeds) -> float:
    """Sums over all tokens, and those of the shares. `factor`: seconds of a multiplication as blocks do them."""
    (rows, columns), (target_moment, multiplied) = layout.shape(group), load.target_moment(layout, group)
    tokens = load.tokens + load.held_out
    sums = tokens * (columns**2 / 2 * speeds.product + 8 * columns * speeds.number)
    if target_moment:
        sums += tokens * factor * (columns**2 if multiplied else 2 * rows * columns)
        sums += 2 * rows * columns**2 * speeds.product if multiplied else 0
    return sums + 10 * 3 * (columns**2 + target_moment) * speeds.number


def all_seconds(request: Request, run: Run, found: list[Layout], timed: Timed, plain: int) -> dict[str, float]:
    """Of the whole run, but for what is done already. `plain`: bytes that are written as they are."""
    source, speeds = request.source, timed.speeds
    total = {"opening": request.clock.seconds.get("open", 0.0)}
    load, done = workload_of(request, run, States(0, None)), {step.finished["finished"] for step in request.steps}
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
    reading = source.size / _GGUF if source.is_gguf else stored / _DISK
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
