"""What a format cannot store is refused before any work; `auto` chooses one that can."""

from pathlib import Path

import pytest

from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.settings import BITS, GPTQ_BITS

ONE_SCALE, ZEROS = {"group_size": -1}, {"symmetric": False}
REFUSED = [
    ("gptq", {"bits": 5}, "format gptq stores 2, 3, 4, 8 bits per weight; got 5; use compressed-tensors"),
    ("gptq", {"layer_bits": ("down_proj=6",)}, "format gptq stores 2, 3, 4, 8 bits per weight; got 4, 6"),
    ("awq", {"bits": 5}, "format awq stores 4-bit weights only"),
    ("awq", {"layer_bits": ("down_proj=6",)}, "format awq stores 4-bit weights only"),
    ("mlx", ONE_SCALE, "format mlx stores groups of 32, 64, 128; got groups of -1"),
    ("mlx", {"group_size": 256}, "format mlx stores groups of 32, 64, 128; got groups of 256"),
    ("gguf", {"bits": 6}, "format gguf stores symmetric weights of 2, 4, 8 bit; got 6 bit"),
    ("gguf", ZEROS, "format gguf stores symmetric weights of 2, 4, 8 bit; got 4 bit with zero points"),
    ("gguf", {"group_size": 64}, "format gguf has groups of 32 at 4 bit, which llmq chooses itself; got 64"),
]


def config(**changes):
    return QuantizeConfig(model="m", output=Path("o"), **changes)


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_a_format_cannot_store_is_refused(name, changes, said):
    with pytest.raises(RequestError, match=said):
        config(format=name, **changes)


@pytest.mark.parametrize("bits", BITS)
def test_other_bits_are_taken(bits):
    assert config(format="compressed-tensors", bits=bits, group_size=-1, symmetric=False).bits == bits
    assert config(format="mlx", bits=bits).bits == bits
    assert config(format="mlx", bits=bits, symmetric=False).grid_settings.real_zeros
    if bits in GPTQ_BITS:
        assert config(format="gptq", bits=bits, symmetric=False).bits == bits


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"bits": 5}, "compressed-tensors"),
        ({"bits": 4} | ZEROS, "awq"),
        ({"bits": 3} | ZEROS, "gptq"),
        ({"bits": 4, "layer_bits": ("down_proj=8",)} | ZEROS, "gptq"),
        ({"bits": 5} | ZEROS, "compressed-tensors"),
        ({"bits": 4, "layer_bits": ("down_proj=6",)} | ZEROS, "compressed-tensors"),
    ],
)
def test_auto_is_a_format_that_engines_serve(changes, chosen):
    assert config(**changes).stored_as == chosen
