"""Calls of llmq are checked against their annotations, shapes included, wherever the tests run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import shape_checks
import torch
from beartype import beartype
from jaxtyping import Float, Int
from shape_checks import jaxtyped
from torch import Tensor

from llmq.core.settings import Grid
from llmq.formats.packing import pack_stream

if TYPE_CHECKING:
    from somewhere import Unknown

check = jaxtyped(typechecker=beartype)


@check
def multiply(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    return multiply.result if hasattr(multiply, "result") else a @ b


def test_a_call_that_keeps_what_it_promises_passes_and_says_nothing():
    assert multiply(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert multiply(torch.ones(5, 6), torch.ones(6, 7)).shape == (5, 7)  # other sizes in another call


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(2, 3), torch.ones(2, 4)),
        (torch.ones(3), torch.ones(3, 4)),
        (torch.ones(2, 3).int(), torch.ones(3, 4)),
    ],
    ids=["another size", "a dimension less", "another dtype"],
)
def test_wrong_arguments_are_refused_before_the_call(a, b):
    with pytest.raises(Exception, match="parameter"):
        multiply(a, b)


@pytest.mark.parametrize("result", [torch.ones(4, 2), torch.ones(2, 4).int(), None], ids=["shape", "dtype", "nothing"])
def test_a_wrong_result_is_refused_by_the_sizes_of_the_arguments(result, monkeypatch):
    monkeypatch.setattr(multiply, "result", result, raising=False)
    with pytest.raises(Exception, match="return"):
        multiply(torch.ones(2, 3), torch.ones(3, 4))


def maker(number: int):
    @check
    def add(x: int, *, times: int = 1) -> int:
        return x + number * times if number else None

    return add


def test_functions_made_of_the_same_code_share_a_check_but_nothing_else():
    one, two, none = maker(1), maker(2), maker(0)
    assert [one(5), two(5), two(5, times=2), one(5)] == [6, 7, 9, 6]
    for function in (one, two):
        with pytest.raises(Exception, match="parameter"):
            function("5")
    with pytest.raises(Exception, match="return"):
        none(5)
    assert (one.__name__, one.__annotations__["x"]) == ("add", "int")


def test_annotations_that_differ_are_checked_apart_though_the_code_is_the_same():
    def make(kind):
        def same(x):
            return x

        same.__annotations__ = {"x": kind}
        return check(same)

    numbers, words = make(int), make(str)
    assert (numbers(1), words("a")) == (1, "a")
    for function, wrong in ((numbers, "a"), (words, 1)):
        with pytest.raises(Exception, match="parameter"):
            function(wrong)


def test_calls_within_a_call_have_sizes_of_their_own():
    @check
    def outer(x: Float[Tensor, "n n"]) -> Float[Tensor, "n"]:
        return inner(x[:1])[0]

    @check
    def inner(x: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return x

    assert outer(torch.ones(3, 3)).shape == (3,)
    with pytest.raises(Exception, match="parameter"):
        outer(torch.ones(2, 3))


def test_fields_of_dataclasses_are_checked():
    @check
    @dataclass(frozen=True)
    class Pair:
        a: Int[Tensor, " n"]
        b: Int[Tensor, " n"]

    assert Pair(torch.arange(3), torch.arange(3)).a.shape == (3,)
    with pytest.raises(Exception, match="parameter"):
        Pair(torch.arange(3), torch.arange(4))


def test_a_generator_has_its_arguments_checked():
    @check
    def count(to: int) -> Iterator[int]:
        yield from range(to)

    assert list(count(3)) == [0, 1, 2]
    with pytest.raises(Exception, match="parameter"):
        count("3")


def test_a_name_that_only_type_checkers_know_allows_anything_and_the_others_are_checked():
    @check
    def takes(known: int, unknown: Unknown) -> int:
        return known

    assert takes(1, object()) == 1
    with pytest.raises(Exception, match="parameter"):
        takes("1", object())


def test_llmq_itself_is_checked():
    assert pack_stream.__code__.co_filename == shape_checks.__file__
    with pytest.raises(Exception, match="parameter"):
        Grid("four", 32, True)
    with pytest.raises(Exception, match="parameter"):
        pack_stream(torch.zeros(3, 4), 4)
