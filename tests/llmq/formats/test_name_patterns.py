"""Patterns of strangers: they match as theirs do, and none of them stops the program."""

import time
from contextlib import suppress

import pytest

from llmq.core.errors import CheckpointError
from llmq.formats import name_patterns as patterns_module
from llmq.formats import schemes_of
from llmq.formats.name_patterns import Patterns

LONG = "model.layers.0." + "a" * 60 + "!"
ENDLESS = "(a|aa)+$"
# Exponential by nature; the library sees through some of them.
CATASTROPHES = ["(a+)+$", "(a*)*$", "(.*a){30}$", r"(\w+\.?)+$", "(a|a)+$"]


def test_match_begins_where_the_name_does_and_search_anywhere():
    patterns = Patterns()
    assert patterns.match("model", "model.layers.0")
    assert patterns.match(r".*\.0$", "model.layers.0")
    assert not patterns.match("layers", "model.layers.0")
    assert patterns.search("layers", "model.layers.0")
    assert not patterns.search("^layers", "model.layers.0")


@pytest.fixture
def impatient(monkeypatch):
    """A tenth of the time."""
    monkeypatch.setattr(patterns_module, "_SECONDS", 0.1)


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_a_pattern_that_would_take_for_ever_ends_within_seconds(pattern):
    began = time.monotonic()
    with suppress(CheckpointError):
        assert not Patterns().match(f"model.layers.0.{pattern}", LONG)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("method", ["match", "search"])
def test_a_pattern_that_takes_too_long_is_refused_and_named(method, impatient):
    with pytest.raises(
        CheckpointError, match=r"the pattern '.*\(a\|aa\)\+\$' takes too long to match layer names against"
    ):
        getattr(Patterns(), method)(".*?" + ENDLESS, LONG)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*?" + ENDLESS: {}}},
        {"quant_method": "auto-round", "bits": 4, "extra_config": {ENDLESS: {}}},
        {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": ["re:.*?" + ENDLESS]},
    ],
    ids=lambda config: config["quant_method"],
)
def test_no_format_waits_for_such_a_pattern(config, impatient):
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="takes too long"):
        schemes_of(config, [LONG])
    assert time.monotonic() - began < 10


def test_the_time_limit_is_for_all_names_together(monkeypatch):
    now = iter([0.0, 0.4, 0.8, 1.2])
    monkeypatch.setattr(patterns_module.time, "process_time", lambda: next(now))
    patterns = Patterns()
    assert patterns.match("a", "a")
    assert patterns.match("b", "b")
    with pytest.raises(CheckpointError, match="takes too long"):
        patterns.match("c", "c")


def test_names_that_each_take_part_of_the_time_do_not_add_up(impatient):
    began = time.monotonic()
    patterns, names = Patterns(), ["a" * length + "!" for length in range(10, 60)]
    with pytest.raises(CheckpointError, match="takes too long"):
        _ = [patterns.match(ENDLESS, name) for name in names]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("pattern", ["(", "*", "[", "a{2,1}", r"\p{nothing}", "(?P<a", r"\L<words>", "(" * 50_000])
def test_what_is_no_regular_expression_is_refused(pattern):
    with pytest.raises(CheckpointError, match="is no regular expression") as caught:
        Patterns().match(pattern, "a")
    assert len(str(caught.value)) < 300


def test_a_pattern_without_end_is_refused_before_it_is_compiled():
    with pytest.raises(CheckpointError, match="a pattern of 200000 characters"):
        Patterns().match("a" * 200_000, "a")


def test_a_pattern_is_compiled_once(monkeypatch):
    compiled, compile_ = [], patterns_module.regex.compile
    monkeypatch.setattr(patterns_module.regex, "compile", lambda p: compiled.append(p) or compile_(p))
    patterns = Patterns()
    assert all(patterns.search(r"\d", f"layers.{i}") for i in range(9))
    assert compiled == [r"\d"]
