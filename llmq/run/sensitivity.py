"""Measures how much each unit of a model loses when it alone is rounded. A unit is what must share its bits.

    a piece of the calibration text ──► block 0 ──► block 1 ──► …               in the original model: the wanted words
      unit 0 rounded in block 0    ──► …       ──► block 1 ──► …  ──► words    a stream of hidden states for each unit
      unit 1 rounded in block 0    ──► …       ──► block 1 ──► …  ──► words
      unit 2 rounded in block 1                ──► …       ──► …  ──► words

The loss of a unit is KL(original || stream), the mean over the tokens. All other blocks keep their weights.

The layers after it in its block are moved as in the run itself (output_matching.py), but not rounded. That matters: in
block 13 of SmolLM2-135M q, k and v at 3 bit cost KL 0.0116 as such, 0.0020 after o, gate, up and down have made up for
it as far as they can, and 0.0019 if the blocks after do so as well (dithered, group 64, WikiText-2, 2026-11-29).

Losses of single units add up: 120 units at 3 bit sum to 0.472, and all at once lose 0.480 (the same model, without
matching). Estimates from gradients missed single units by factors of up to 5, most in the first blocks and for k.
"""

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm import tqdm

from llmq.calibration.block_runner import Block
from llmq.calibration.block_stream import StreamSettings, stream
from llmq.calibration.predictions import predictions, some_tokens
from llmq.calibration.texts import Tokens
from llmq.core.errors import WorkError
from llmq.models.block_structure import Group
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request
from llmq.run.trial import rounded_alone, units_of
from llmq.training.kl_loss import divergence

MEASURED_BITS = 3
"""The bits at which every unit is measured. What it loses at others follows from them: see bit_budget.py."""
_WINDOW = 256  # tokens of a piece of text
_STATISTICS, _PROBE = 32, 4  # pieces for the moments of the inputs, and for the loss
_SCORED = 340  # tokens whose predictions are compared, evenly spread
_SCORED_AT_THE_END = 2048  # the same for the whole model
_MORE_TEXT = math.log(0.258 / 0.326) / math.log(29696 / 8192)
_TINY = 1e-12  # a loss whose logarithm can be interpolated
_BLOCKS = 16  # blocks that are measured, or a few more; the loss in others is interpolated


@dataclass(frozen=True)
class Unit:
    """Linears that must have the same bits, and what the model loses if they alone are rounded."""

    linears: tuple[str, ...]  # names in the model
    loss: float | None  # KL in nats per token, with MEASURED_BITS; None if the text does not run them
    is_measured: bool = True  # False: interpolated between those of other blocks, or None


@dataclass
class _Stream:
    """The hidden states of the text in a model in which one unit is rounded; in the original one without a unit."""

    hidden: list[Tensor]  # by micro-batch
    loss: float = 0.0


@dataclass(frozen=True)
class _Found:
    """A unit of a block, and its stream if it is measured."""

    position: int  # of the block in the model
    names: tuple[str, ...]  # of its linears in the block
    runs: bool
    stream: _Stream | None


def measure(request: Request, run: Run) -> list[Unit]:
    """Return all units of the blocks to quantize, with their losses, in the order of the model.

    Raises WorkError if a loss is not finite.
    """
    source, clock, tokens = request.source, request.clock, _pieces(request.tokens)
    found, original, batch_dim = list[_Found](), _Stream([]), 0
    settings = StreamSettings(linears=run.linear_dtype(request.compute), resident=True)
    measured = measured_blocks(run)
    with closing(stream(source, tokens, request.compute, clock, settings)) as blocks:
        bar = tqdm(blocks, "measuring", total=len(source.block_names), disable=not request.progress, unit="block")
        for position, block in enumerate(bar):
            original.hidden, batch_dim = original.hidden or _probe(block), block.batch_dim
            units = units_of(run, block) if block.name in run.chosen else []
            runs = [unit[0].calls != 0 for unit in units]
            is_measured = block.name in measured
            begun = [
                _begun(run, block, unit, units) if is_measured and it_runs else None
                for unit, it_runs in zip(units, runs, strict=True)
            ]
            with clock("streams"), block.many_runs():
                for each in (original, *(each.stream for each in found if each.stream)):
                    each.hidden = _passed(block, each.hidden)
            found += map(partial(_Found, position), map(_names, units), runs, begun)
    with clock("predict"), predictions(source, tokens.train[:1], request.compute) as predict:
        step = max(1, tokens.held_out.numel() // _SCORED)
        wanted = [predict(some_tokens(hidden, batch_dim, step)) for hidden in original.hidden]
        for each in found:
            if each.stream is not None:
                given = (predict(some_tokens(hidden, batch_dim, step)) for hidden in each.stream.hidden)
                each.stream.loss = _mean_divergence(given, wanted)
                each.stream.hidden.clear()
    factor = _factor(request.tokens.train.numel() / tokens.train.numel())
    units = [_unit(source.block_names, each, found) for each in found]
    return [unit if unit.loss is None else replace(unit, loss=factor * unit.loss) for unit in units]


def _factor(text: float) -> float:
    """Return what losses are multiplied by, because the run has so many times the text of the measurement.

    With more text layers are rounded better, and others make up for more of the rest. With 29,696 instead of 8192
    tokens the losses of SmolLM2-135M sum to 0.258 instead of 0.326, those of each kind to 0.74 to 0.82 times as much
    (dithered, 2026-11-29). More text was not measured.
    """
    return min(max(text, 1.0), 4.0) ** _MORE_TEXT


def check_predictions(request: Request) -> None:
    """Raise RequestError if the model cannot predict from given hidden states, before minutes of work."""
    with predictions(request.source, _pieces(request.tokens).train[:1], request.compute):
        pass


def held_out_loss(request: Request, run: Run, block: Block) -> float | None:
    """Return the mean KL of the quantized model's predictions on held-out tokens, after its last block.

    None if the original model did not run beside it.
    """
    if block.original is None or block.arguments is None:
        return None
    at = range(block.held_out_from, len(block.hidden))
    step = max(1, sum(block.hidden[i].shape[:-1].numel() for i in at) // _SCORED_AT_THE_END)
    one, losses, tokens = request.tokens.train[:1], list[float](), 0
    with run.clock("predict"), predictions(run.source, one, request.compute) as predict:
        for i in at:
            with block.many_runs():
                given = predict(some_tokens(block.run_batch(i), block.batch_dim, step))
            wanted = predict(some_tokens(block.original[i].to(request.compute.device), block.batch_dim, step))
            losses.append(float(divergence(given, wanted)) * wanted.shape[:-1].numel())
            tokens += wanted.shape[:-1].numel()
    totals = run.ranks.each((losses, tokens))
    return math.fsum(loss for each, _ in totals for loss in each) / sum(count for _, count in totals)


def streams_bytes(run: Run, dtype: torch.dtype) -> int:
    """Return about as many bytes as the hidden states of all streams take, and the logits of two of them."""
    text, units = run.source.config.get_text_config(), 6 * len(measured_blocks(run))  # in most blocks there are 4
    return (units * _PROBE * _WINDOW * text.hidden_size + 2 * _PROBE * _WINDOW * text.vocab_size) * dtype.itemsize


def measured_blocks(run: Run) -> set[str]:
    """Return the names of the blocks that are measured: of those with the same linears the first and the last two, and
    every few between.
    """
    alike: dict[object, list[str]] = {}
    for name in run.chosen:
        modules = run.source.skeleton.get_submodule(name).named_modules()
        shapes = tuple((inner, m.weight.shape) for inner, m in modules if isinstance(m, nn.Linear))
        alike.setdefault(shapes, []).append(name)
    step = max(1, round(len(run.chosen) / _BLOCKS))
    return {name for names in alike.values() for name in (*names[:2], *names[::step], *names[-2:])}


def _unit(blocks: list[str], one: _Found, found: list[_Found]) -> Unit:
    """Return a unit with its loss. If it is not measured: between those of the nearest blocks, on a log scale."""
    linears = tuple(f"{blocks[one.position]}.{name}" for name in one.names)
    if one.stream is not None:
        return Unit(linears, one.stream.loss)
    if not one.runs:
        return Unit(linears, None, False)
    known = {each.position: each.stream.loss for each in found if each.names == one.names and each.stream}
    lower, upper = ([at for at in known if (at < one.position) == is_lower] for is_lower in (True, False))
    below, above = (lower or upper[:1])[-1], (upper or lower[-1:])[0]
    share = (one.position - below) / (above - below) if above > below else 0.0
    return Unit(linears, max(known[below], _TINY) ** (1 - share) * max(known[above], _TINY) ** share, False)


def _pieces(tokens: Tokens) -> Tokens:
    """Return pieces of the calibration text: some for the moments, and held-out ones for the loss."""

    def some(ids: Int64[Tensor, "samples length"], most: int) -> Int64[Tensor, "pieces window"]:
        window = min(_WINDOW, ids.shape[1])
        pieces = ids[:, : ids.shape[1] // window * window].reshape(-1, window)
        chosen = torch.linspace(0, len(pieces) - 1, min(most * _WINDOW // window, len(pieces))).round().long()
        return pieces[chosen]

    return Tokens(some(tokens.train, _STATISTICS), some(tokens.held_out, _PROBE))


def _probe(block: Block) -> list[Tensor]:
    """Return the hidden states that enter a block in the original model."""
    return [block.hidden[i] for i in range(block.held_out_from, len(block.hidden))]


def _passed(block: Block, hidden: list[Tensor]) -> list[Tensor]:
    """Return the outputs of a block. What earlier blocks left for it beside hidden states is the original model's."""
    return [block.run_with({}, states, (block.held_out_from + i, False)) for i, states in enumerate(hidden)]


def _mean_divergence(given: Iterable[Tensor], wanted: list[Tensor]) -> float:
    """Return the mean KL(wanted || given). Raises WorkError if it is not finite."""
    losses = [float(divergence(*pair)) * len(pair[1]) for pair in zip(given, wanted, strict=True)]
    loss = sum(losses) / sum(map(len, wanted))
    if not math.isfinite(loss):
        raise WorkError("the loss of a layer is not finite, so no bits can be chosen; use --bits")
    return max(loss, 0.0)  # of almost equal predictions, rounding can make it negative


def _names(unit: list[Group]) -> tuple[str, ...]:
    return tuple(name for group in unit for name in group.linears)


def _begun(run: Run, block: Block, unit: list[Group], units: list[list[Group]]) -> _Stream:
    """Return the hidden states that leave a block in which this unit alone is rounded."""
    with rounded_alone(run, block, unit, units, MEASURED_BITS), run.clock("streams"), block.many_runs():
        return _Stream(_passed(block, _probe(block)))
