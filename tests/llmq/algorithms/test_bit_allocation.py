"""The chosen bits are the best that a budget allows: compared with every choice there is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.algorithms.bit_allocation import Option, allocate
from llmq.core.errors import RequestError

BITS = (2, 3, 4, 8)


@st.composite
def problems(draw):
    """(units, budget): up to five units of any size, whose losses fall with the bits or do not."""
    units = {}
    for name in "abcde"[: draw(st.integers(1, 5))]:
        size = draw(st.floats(0.1, 100))
        bits = draw(st.lists(st.sampled_from(BITS), min_size=1, unique=True))
        units[name] = {b: Option(size * b, draw(st.floats(0, 10))) for b in bits}
    least = sum(min(o.cost for o in options.values()) for options in units.values())
    return units, least * draw(st.floats(1, 5))


def cost(units, chosen):
    return sum(units[name][bits].cost for name, bits in chosen.items())


def loss(units, chosen):
    return sum(units[name][bits].loss for name, bits in chosen.items())


@given(problems())
@settings(max_examples=60, deadline=None)
def test_no_choice_within_the_budget_is_better(problem):
    units, budget = problem
    found = allocate(units, budget)
    assert cost(units, found) <= budget * (1 + 1e-9)
    every = [dict(zip(units, bits, strict=True)) for bits in itertools.product(*units.values())]
    # Costs are rounded up to steps of 1/100,000 of the budget: five of them may be lost.
    inside = [loss(units, chosen) for chosen in every if cost(units, chosen) <= budget * (1 - 6e-5)]
    assert loss(units, found) <= min(inside, default=float("inf")) + 1e-9


def test_a_budget_that_just_suffices_gives_everyone_the_least():
    units = {str(i): {2: Option(2 / 3, 1.0), 3: Option(1.0, 0.5)} for i in range(7)}
    assert allocate(units, 7 * (2 / 3)) == dict.fromkeys(units, 2)


def test_a_budget_that_does_not_suffice_is_refused():
    with pytest.raises(RequestError, match=r"at least 4 for these layers; got 3\.5"):
        allocate({"a": {2: Option(2.0, 1.0)}, "b": {2: Option(2.0, 1.0), 4: Option(4.0, 0.0)}}, 3.5)


def test_where_a_bit_saves_more_it_goes_there():
    units = {
        name: {b: Option(100.0 * b, weight * 4.0**-b) for b in BITS} for name, weight in (("a", 1.0), ("b", 100.0))
    }
    assert allocate(units, 600.0) == {"a": 2, "b": 4}
    assert allocate(units, 800.0) == {"a": 4, "b": 4}
