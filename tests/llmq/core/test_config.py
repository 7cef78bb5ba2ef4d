"""What people pass in Python is taken, or refused in words that are true."""

from pathlib import Path

import jaxtyping
import pytest

from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError


@pytest.fixture(autouse=True)
def _no_checks():
    """Whoever uses llmq calls it without the tests' checks of types."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def config(**changes):
    return QuantizeConfig(**({"model": "m", "output": Path("o")} | changes))


def test_paths_may_be_text_and_text_may_be_a_path():
    taken = config(model=Path("a"), output="b", calibration=Path("c.txt"), offload_dir="d")
    assert (taken.model, taken.output, taken.calibration, taken.offload_dir) == ("a", Path("b"), "c.txt", Path("d"))


def test_numbers_may_be_text_and_several_values_a_list_or_one_text():
    taken = config(bits="4", group_size="-1", samples=8.0, layer_bits=["down_proj=8"], without="match")
    assert (taken.bits, taken.group_size, taken.samples) == (4, -1, 8)
    assert type(taken.samples) is int
    assert (taken.layer_bits, taken.without) == (("down_proj=8",), ("match",))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": "four"}, "bits must be a whole number; got 'four'"),
        ({"samples": 8.5}, "samples must be a whole number; got 8.5"),
        ({"seed": None}, "seed must be a whole number; got None"),
        ({"output": None}, "output must be a path or a name; got None"),
        ({"offload_dir": 5}, "offload_dir must be a path or a name; got 5"),
        ({"device": "cuda:x"}, "device must be one of auto, cpu, cuda, cuda:N; got 'cuda:x'"),
    ],
)
def test_other_values_are_refused_by_name(changes, said):
    with pytest.raises(RequestError, match=said):
        config(**changes)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_a_device_may_have_a_number(device):
    assert config(device=device).device == device


@pytest.mark.parametrize("blocks", ["²", "0-²", "①"])
def test_signs_that_look_like_numbers_are_no_blocks(blocks):
    with pytest.raises(RequestError, match="blocks are numbers and ranges"):
        config(blocks=blocks).chosen_blocks(4)
