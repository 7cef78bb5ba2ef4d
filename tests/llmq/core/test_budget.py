from fractions import Fraction
from pathlib import Path

import pytest

from llmq.core.budget import bytes_of, spending_of
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError


def config(**changes):
    return QuantizeConfig("demo", Path("out"), **changes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("2.5GB", 2_500_000_000),
        ("2.5 gb", 2_500_000_000),
        ("700MiB", 700 * 2**20),
        ("1.5K", 1500),
        ("123456", 123456),
        ("3T", 3 * 10**12),
    ],
)
def test_sizes_have_the_usual_units(size, expected):
    assert bytes_of(size) == expected


@pytest.mark.parametrize("size", ["", "much", "-1GB", "1e9", "2,5GB", "5 bits"])
def test_other_sizes_are_refused(size):
    with pytest.raises(RequestError, match="a number with a unit"):
        bytes_of(size)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 3.5, "size": "1GB"}, "one of budget and size"),
        ({"budget": 3.5, "bits": 3}, "one of bits, budget and size"),
        ({"budget": 1.5}, "more than 2; got 1.5"),
        ({"budget": float("nan")}, "more than 2; got nan"),
        ({"budget": 3.5, "widths": (3, 7)}, "widths must be among 2, 3, 4, 5, 6, 8; got 7"),
        ({"widths": (4, 8)}, "widths belong to --budget or --size"),
        ({"budget": 5.0, "method": "rtn"}, "rtn uses no text"),
        ({"budget": 5.0, "format": "awq"}, "no choice"),
        ({"budget": 5.0, "format": "gptq", "widths": (4, 5)}, "gptq stores 2, 3, 4, 8"),
        ({"budget": 5.0, "format": "gguf", "widths": (3, 4)}, "gguf stores"),
        ({"size": "large"}, "a number with a unit"),
        ({"budget": 5.0, "samples": 1}, "at least 2 for a budget"),
        ({"budget": 5.0, "dry_run": True, "calibration": "self"}, "choose another --calibration"),
    ],
    ids=str,
)
def test_a_budget_that_cannot_be_met_is_refused_before_any_work(changes, said):
    with pytest.raises(RequestError, match=said):
        config(**changes)


@pytest.mark.parametrize(
    ("changes", "stored_as", "widths"),
    [
        ({}, "compressed-tensors", (2, 3, 4, 5, 6, 8)),
        ({"widths": (8, 4, 4)}, "compressed-tensors", (4, 8)),
        ({"format": "gptq"}, "gptq", (2, 3, 4, 8)),
        ({"format": "gguf"}, "gguf", (2, 4, 8)),
        ({"symmetric": False}, "gptq", (2, 3, 4, 8)),
        ({"symmetric": False, "widths": (4, 6)}, "compressed-tensors", (4, 6)),
    ],
    ids=str,
)
def test_the_bits_to_choose_from_are_those_that_the_format_has(changes, stored_as, widths):
    asked = config(budget=5.0, **changes)
    assert asked.stored_as == stored_as
    assert asked.spending.widths == asked.all_bits == widths


def test_without_a_budget_nothing_changes():
    assert config().spending is None
    assert config(bits=3, layer_bits=("a=5",)).all_bits == (3, 5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("3.5", "", ()), (3.5, "", ())),
        ((None, "1GB", [3.0, "4"]), (0.0, "1GB", (3, 4))),
        ((Fraction(7, 2), "", 4), (3.5, "", (4,))),
        ((0, 123456, "8"), (0.0, "123456", (8,))),
    ],
    ids=str,
)
def test_numbers_may_be_given_in_any_python_type(given, expected):
    assert tuple(spending_of(*given).values()) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("abc", "", ()), "budget must be a number"),
        (([4], "", ()), "budget must be a number"),
        ((10**400, "", ()), "budget must be a number"),
        ((0, b"1GB", ()), "size is a number"),
        ((0, 2.5e9, ()), "size is a number"),
        ((0, "", [4.5]), "widths must be whole"),
        ((0, "", ([4],)), "widths must be whole"),
        ((0, "", None), "widths must be whole"),
    ],
    ids=str,
)
def test_other_values_are_refused_by_name(given, said):
    with pytest.raises(RequestError, match=said):
        spending_of(*given)


def test_no_size_is_too_long_to_read():
    assert bytes_of("9" * 400) == 10**18
