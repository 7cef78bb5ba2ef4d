"""Chooses the bits of each unit of a model for a budget, from what each loses (sensitivity.py).

    loss at b bits  =  measured loss · error of rounding at b bits / error at the measured bits

Losses add up, so the sum over the units predicts the KL of the whole. Which bits give the least sum within the budget
is an exact choice (bit_allocation.py).
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from llmq.algorithms.bit_allocation import Option, allocate
from llmq.checkpoint.output_dir import write_json
from llmq.core.budget import Budget
from llmq.core.errors import RequestError
from llmq.models.packable import can_pack
from llmq.run.block_quantizer import Run
from llmq.run.layer_bits import named_bits
from llmq.run.prepare import Request
from llmq.run.sensitivity import Unit, check_predictions, measure
from llmq.run.stored_size import files_beside, packed_sizes, plain_bytes

ERRORS = {2: 4.0, 3: 1.0, 4: 0.26, 5: 0.067, 6: 0.017, 8: 0.001}
"""Mean squared error of rounding at each number of bits, as a multiple of that at 3 bits.

Normally distributed weights on symmetric grids of least error, in groups of 64: 4.02, 1, 0.261, 0.0679, 0.0171, 0.0011;
groups of 32 and 128 and grids with zero points differ by up to 15 %. GPTQ's errors on the 210 linears of SmolLM2-135M:
2 bit 3.5 to 4.6, half of them 3.9 to 4.2; 4 bit 0.24 to 0.33, half of them 0.26 to 0.27 (2026-11-29)."""


_LEAST = 1e-3  # share of the median loss of a weight that every weight counts for


@dataclass(frozen=True)
class Choice:
    """The bits of a run with a budget, and what they are expected to cost."""

    units: list[Unit]
    bits: dict[str, int]  # of each linear of the units, by its name in the model
    predicted: float  # KL in nats per token
    uniform: dict[int, tuple[float, float]]  # by bits: stored bits per weight and predicted KL if all units had them
    average: float  # stored bits per weight

    def to_json(self) -> dict[str, Any]:
        """Return what the report says of it."""
        units = [dataclasses.asdict(unit) | {"bits": self.bits[unit.linears[0]]} for unit in self.units]
        uniform = {str(bits): {"stored_bits": stored, "kl": kl} for bits, (stored, kl) in self.uniform.items()}
        return {"stored_bits": self.average, "predicted_kl": self.predicted, "uniform": uniform, "units": units}


def check_budget(request: Request, run: Run, units: Sequence[tuple[str, ...]]) -> None:
    """Raise RequestError if no bits meet the budget, before the losses are measured.

    `units`: the names of the linears of each.
    """
    _fitting(run, [Unit(names, 0.0) for names in units])
    check_predictions(request)


def kept_units(request: Request, path: Path, units: Sequence[tuple[str, ...]]) -> list[Unit] | None:
    """Return the losses that an interrupted run has measured; None if they must be measured.

    Raises RequestError if they are damaged and blocks are finished, which have the bits that these losses chose.
    """
    if not request.config.resume:
        return None
    try:
        kept = [
            Unit(tuple(each["linears"]), each["loss"], each["is_measured"]) for each in json.loads(path.read_bytes())
        ]
        if [unit.linears for unit in kept] == list(units) and all(map(_is_sound, kept)):
            return kept
    except (OSError, ValueError, TypeError, KeyError):
        pass
    if any(step.finished["schemes"] for step in request.steps):
        raise RequestError(f"{path} is damaged, so the run there cannot be resumed; --overwrite begins anew")
    return None


def _is_sound(unit: Unit) -> bool:
    return unit.loss is None or (isinstance(unit.loss, float) and 0 <= unit.loss < math.inf)


def spend(request: Request, run: Run, kept: Sequence[Unit] | None = None, path: Path | None = None) -> Choice:
    """Measure the units of a model, and give its linears the bits that suit the budget best.

    Args:
        kept: what an interrupted run has measured.
        path: the file that the losses are written to.

    Raises RequestError if an interrupted run has given other bits to the blocks that it finished.
    """
    units = request.ranks.first(lambda: list(kept) if kept is not None else measure(request, run))
    if path is not None and request.ranks.is_first:
        write_json(path, [dataclasses.asdict(unit) for unit in units])
    choice = choose(run, units)
    for step in request.steps:
        for name, (bits, *_) in step.finished["schemes"].items():
            if choice.bits.get(name, bits) != bits:
                raise RequestError(
                    f"{name} got {bits} bit in the interrupted run, now {choice.bits[name]}; use --overwrite"
                )
    run.assign(choice.bits)
    run.report.budget = choice.to_json()
    return choice


def choose(run: Run, units: Sequence[Unit]) -> Choice:
    """Return the bits with the least predicted loss within the run's budget.

    Raises RequestError if nothing fits into it.
    """
    options, allowed = _fitting(run, units)
    chosen = allocate(options, allowed)
    bits = {name: chosen[unit.linears[0]] for unit in units for name in unit.linears}
    picked = [options[name][b] for name, b in chosen.items()]
    count = sum(run.source.skeleton.get_submodule(name).weight.numel() for name in bits)
    uniform = {
        b: (8 * sum(each[b].cost for each in options.values()) / count, sum(each[b].loss for each in options.values()))
        for b in run.config.all_bits
        if all(b in each for each in options.values())
    }
    average = 8 * sum(option.cost for option in picked) / count
    unseen = [unit.linears[0] for unit in units if unit.loss is None]
    if unseen:
        note = f"the text does not run {len(unseen)} of {len(units)} kinds of linears ({unseen[0]}, …)"
        run.report.note("model", [f"{note}: their bits follow from the median loss of the others"])
    return Choice(list(units), bits, sum(option.loss for option in picked), uniform, average)


def _fitting(run: Run, units: Sequence[Unit]) -> tuple[dict[str, dict[int, Option]], float]:
    """Return the options of each unit, by its first linear, and the bytes that they may take together.

    Raises RequestError if the smallest ones take more, or if `--layer-bits` names only a part of a unit.
    """
    budget, weights = run.config.spending, _Weights(run)
    assert budget is not None
    counts = [weights.count(unit) for unit in units]
    known = [unit.loss / count for unit, count in zip(units, counts, strict=True) if unit.loss]
    usual = median(known) if known else 1.0
    options = dict[str, dict[int, Option]]()
    for unit, count in zip(units, counts, strict=True):
        # At least a little: otherwise a layer whose loss was too small to see would get the fewest bits for nothing.
        loss = count * usual if unit.loss is None else max(unit.loss, _LEAST * count * usual)
        costs = {bits: float(weights.nbytes(unit, bits)) for bits in _widths(run, unit, budget, weights)}
        options[unit.linears[0]] = {bits: Option(cost, loss * ERRORS[bits]) for bits, cost in costs.items()}
    fixed = plain_bytes(run, {name for unit in units for name in unit.linears}) + files_beside(run.source)
    allowed = (budget.bits or 0.0) * sum(counts) / 8 if budget.nbytes is None else float(budget.nbytes - fixed)
    least = sum(min(option.cost for option in each.values()) for each in options.values())
    if allowed < least:
        raise RequestError(_too_small(budget, least, sum(counts), fixed))
    return options, allowed


class _Weights:
    """Sizes of the linears of a model."""

    def __init__(self, run: Run) -> None:
        self._run, self._packed = run, packed_sizes(run)
        self.named = named_bits(run.config, run.source)

    def shape(self, name: str) -> tuple[int, int]:
        """Return (rows, columns)."""
        rows, columns = self._run.source.skeleton.get_submodule(name).weight.shape
        return rows, columns

    def count(self, unit: Unit) -> int:
        """Count the weights of a unit."""
        return sum(prod(self.shape(name)) for name in unit.linears)

    def nbytes(self, unit: Unit, bits: int) -> int:
        """Return the stored bytes of a unit."""
        return sum(self._packed(self.shape(name), bits) for name in unit.linears)


def _widths(run: Run, unit: Unit, budget: Budget, weights: _Weights) -> list[int]:
    """Return the bits that a unit may have. `--layer-bits` leaves it one."""
    named = {weights.named.get(name) for name in unit.linears}
    if len(named) > 1:
        listed_names = ", ".join(unit.linears[:4])
        raise RequestError(f"layer bits: {listed_names} need the same bits; name all of them, or none")
    fixed = named.pop()
    linears = [run.source.skeleton.get_submodule(name) for name in unit.linears]
    return [bits for bits in ((fixed,) if fixed else budget.widths) if all(can_pack(each, bits) for each in linears)]


def _too_small(budget: Budget, least: float, count: int, fixed: int) -> str:
    way = "allow more, or fewer bits in --widths"
    if budget.nbytes is None:
        return (
            f"the layers take at least {8 * least / count:.3g} bits per weight; got a budget of {budget.bits:g}; {way}"
        )
    whole, not_packed, size = (f"{nbytes / 1e6:,.3f} MB" for nbytes in (least + fixed, fixed, budget.nbytes))
    return f"the checkpoint takes at least {whole}, {not_packed} of them not quantized; got a size of {size}; {way}"


def table(choice: Choice) -> Iterator[str]:
    """Yield a choice as lines of text: how many units of each kind get which bits, and what uniform bits would give."""
    kinds: dict[str, list[Unit]] = {}
    for unit in choice.units:
        kinds.setdefault("+".join(dict.fromkeys(name.rpartition(".")[2] for name in unit.linears)), []).append(unit)
    widths = sorted(set(choice.bits.values()))
    yield f"budget    {'layers':<40} {'KL at 3 bit':>12} " + " ".join(f"{bits:>3} bit" for bits in widths)
    for kind, units in kinds.items():
        counts = Counter(choice.bits[unit.linears[0]] for unit in units)
        cells = " ".join(f"{counts[bits] or '':>7}" for bits in widths)
        yield f"          {kind:<40} {sum(unit.loss or 0.0 for unit in units):>12.4f} {cells}"
    yield f"          {choice.average:.3f} stored bits per weight, predicted KL {choice.predicted:.4f}"
    for bits, (stored, kl) in choice.uniform.items():
        yield f"          all {bits} bit: {stored:.3f} stored bits per weight, predicted KL {kl:.4f}"
