"""Chooses how many bits each unit of a model gets, so that the predicted loss is least within a budget.

Objective:    min Σ_u loss(u, b_u)    subject to    Σ_u cost(u, b_u) ≤ budget

A unit is a set of linears that must share their bits: those that engines fuse, or all experts of a layer. This is the
multiple-choice knapsack problem. It is solved by dynamic programming over the units, with the cost counted in steps of
1/100,000 of the budget, each unit's cost rounded up. The budget always holds; the choice is exact but for the rounding.

Two units that cost as much as they have bits. 6 bits in all are best spent where a bit saves more:

    >>> units = {"a": {2: Option(2.0, 0.9), 4: Option(4.0, 0.1)}, "b": {2: Option(2.0, 0.5), 4: Option(4.0, 0.2)}}
    >>> allocate(units, budget=6.0)
    {'a': 4, 'b': 2}
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

import numpy as np

from llmq.core.errors import RequestError

_STEPS = 100_000


@dataclass(frozen=True)
class Option:
    """What a unit takes and loses at one number of bits."""

    cost: float  # stored bits, or bytes: what the budget counts
    loss: float  # predicted loss of the whole model because of this unit, ≥ 0


def allocate(units: Mapping[str, Mapping[int, Option]], budget: float) -> dict[str, int]:
    """Return the bits of each unit.

    Raises RequestError if the budget does not suffice for the cheapest option of every unit.
    """
    least = sum(min(option.cost for option in options.values()) for options in units.values())
    if least > budget:
        raise RequestError(f"the budget must be at least {least:.6g} for these layers; got {budget:.6g}")
    step, most = budget / _STEPS, _STEPS + len(units)
    steps = {
        name: {bits: ceil(option.cost / step - 1e-9) for bits, option in options.items()}
        for name, options in units.items()
    }
    # best[c]: the least loss of the units so far, at a cost of c steps or less.
    best, choices = np.zeros(most + 1), list[np.ndarray]()
    for name, options in units.items():
        tried = np.full((len(options), most + 1), np.inf)
        for row, (bits, option) in zip(tried, options.items(), strict=True):
            at = min(steps[name][bits], most + 1)
            row[at:] = best[: most + 1 - at] + option.loss
        choices.append(tried.argmin(0).astype(np.uint8))
        best = tried.min(0)

    def chosen(left: int) -> dict[str, int]:
        found = dict[str, int]()
        for name, choice in list(zip(units, choices, strict=True))[::-1]:
            found[name] = list(units[name])[choice[left]]
            left -= steps[name][found[name]]
        return {name: found[name] for name in units}

    # Rounded up, costs may seem to exceed a budget that they fit. So more steps are allowed, and the true sum decides.
    for left in range(most, -1, -1):
        found = chosen(left)
        if sum(units[name][bits].cost for name, bits in found.items()) <= budget * (1 + 1e-12):
            return found
    raise AssertionError("the cheapest options fit")
