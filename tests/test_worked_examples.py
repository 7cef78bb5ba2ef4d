"""The worked examples in docstrings print what they say."""

import doctest
import importlib

import pytest

MODULES = (
    "llmq.core.grid",
    "llmq.formats.packing",
    "llmq.algorithms.gptq",
    "llmq_kernels.layout",
    "llmq_kernels.experts",
)


@pytest.mark.parametrize("name", MODULES)
def test_a_worked_example_prints_what_it_says(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
