"""The blocks of GGUF: against bytes written by hand, against the package gguf, and against themselves."""

import dataclasses
import re
import struct

import gguf as package
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import random_weight
from stored import DTYPES, LAYERS, NAME, check_missing_parts, check_refused

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import gguf
from llmq.formats.scheme import Scheme

KINDS = {"Q4_0": (4, True), "Q4_1": (4, False), "Q8_0": (8, True), "Q2_0": (2, True)}


def blocks_of(weight, symmetric=True, size=None):
    """The blocks of a weight, [out, bytes]."""
    return gguf.encode(NAME, weight, Scheme(weight.bits, size or weight.group_size, symmetric))[f"{NAME}.blocks"]


def read(kind, blocks):
    scheme = gguf.schemes_of({"types": {NAME: kind}}, [NAME])[NAME]
    return gguf.decode(NAME, {f"{NAME}.blocks": blocks}, scheme)


def weight_of(kind, rows=1, blocks=1, repeats=1, dtype=torch.float16, seed=0):
    """A random weight that this type stores. `repeats`: how many blocks have the same scale."""
    bits, symmetric = KINDS[kind]
    columns = gguf.TYPES[kind].weights * repeats * blocks
    weight = random_weight(rows, columns, blocks, bits, symmetric, dtype, seed)
    # Few digits, so that float16 holds the scale whatever the dtype, and scale * zero.
    few = (weight.scale.float() * 1024).round().clamp(-120, 120) / 1024
    return dataclasses.replace(weight, scale=few.to(dtype))


@st.composite
def weights(draw):
    """A type and a weight that it stores."""
    kind, dtype = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from(DTYPES))
    sizes = [draw(st.integers(1, most)) for most in (9, 3, 4)]
    return kind, weight_of(kind, *sizes, dtype, draw(st.integers(0, 1000)))


@given(weights())
@settings(max_examples=150, deadline=None)
def test_decode_gives_back_what_encode_was_given(drawn):
    kind, weight = drawn
    before = dataclasses.replace(weight, q=weight.q.clone(), scale=weight.scale.clone(), zero=weight.zero.clone())
    found = read(kind, blocks_of(weight, KINDS[kind][1]))
    assert gguf.is_same(found, weight)
    assert gguf.is_same(weight, before)  # which are not changed
    size = gguf.TYPES[kind].weights
    repeats = weight.group_size // size
    assert (found.bits, found.group_size, found.scale.dtype) == (weight.bits, size, torch.float16)
    assert torch.equal(found.scale.to(weight.scale.dtype), weight.scale.repeat_interleave(repeats, 1))
    assert torch.equal(found.zero, weight.zero.repeat_interleave(repeats, 1))
    assert torch.equal(found.q, weight.q)


@pytest.mark.parametrize("change", ["q", "scale", "zero"])
def test_weights_that_differ_in_one_number_are_not_the_same(change):
    weight = weight_of("Q4_1", 3, 2, 2)
    other = getattr(weight, change).clone()
    other[2, -1] = other[2, -1] - 1 if other[2, -1] > 0 else 1
    assert not gguf.is_same(read("Q4_1", blocks_of(weight, False)), dataclasses.replace(weight, **{change: other}))


def golden(kind):
    """A row of one block: codes 0, 1, 2, …, as far as there are any, and then again; scale -0.375."""
    bits, symmetric = KINDS[kind]
    q = torch.arange(gguf.TYPES[kind].weights)[None] * (7 if bits == 8 else 1) % 2**bits
    zero = 2 ** (bits - 1) if symmetric else 5
    return QuantizedWeight(
        q.to(torch.uint8), torch.tensor([[-0.375]]).half(), torch.tensor([[zero]], dtype=torch.uint8), bits
    )


# Written by hand from the table in llmq/formats/gguf.py. Codes 0..15, 0..15 lie as 0x00, 0x11, …: i and i + 16.
GOLDEN = {
    "Q4_0": struct.pack("<e", -0.375) + bytes(i | i << 4 for i in range(16)),
    "Q4_1": struct.pack("<ee", -0.375, 0.375 * 5) + bytes(i | i << 4 for i in range(16)),
    "Q8_0": struct.pack("<e", -0.375) + bytes((7 * i - 128) % 256 for i in range(32)),
    # Codes 0, 1, 2, 3 stand for -2, -1, 0, 1 steps of -0.375; here codes stand for -1, 0, 1, 2 steps of 0.375.
    "Q2_0": struct.pack("<e", 0.375) + bytes([3 | 2 << 2 | 1 << 4 | 0 << 6] * 16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_has_the_bytes_of_the_table(kind):
    weight, number = golden(kind), gguf.TYPES[kind].number
    blocks = blocks_of(weight, KINDS[kind][1])
    assert bytes(blocks.numpy()) == GOLDEN[kind]
    assert gguf.is_same(read(kind, blocks), weight)
    if kind != "Q2_0":  # which is newer than some versions of the package
        theirs, size = package.GGMLQuantizationType(number), (gguf.TYPES[kind].weights, gguf.TYPES[kind].nbytes)
        assert (theirs.name, package.GGML_QUANT_SIZES[theirs]) == (kind, size)


def dequantized(kind, blocks):
    """What other readers make of the blocks: the package gguf, or the table written out."""
    if kind != "Q2_0":
        return package.dequantize(blocks.numpy(), package.GGMLQuantizationType[kind])
    each = blocks.unflatten(1, (-1, 18))
    d = each[..., :2].contiguous().view(torch.float16).float()
    codes = [each[..., 2 + j // 4] >> 2 * (j % 4) & 3 for j in range(64)]
    return (d * (torch.stack(codes, -1).float() - 1)).flatten(1).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_other_readers_find_the_weights_that_llmq_means(kind):
    weight = weight_of(kind, 5, 2, 3)
    found = dequantized(kind, blocks_of(weight, KINDS[kind][1]))
    assert np.array_equal(found, weight.dequantize().numpy())


def test_a_large_group_is_written_as_blocks_with_the_same_scale():
    weight = weight_of("Q4_0", 2, 1, 4)
    heads = blocks_of(weight).unflatten(1, (-1, 18))[..., :2].contiguous().view(torch.float16)[..., 0]
    assert torch.equal(heads, weight.scale.expand(2, 4))
    assert torch.equal(blocks_of(weight, size=-1), blocks_of(weight))


BITS_OF_SCALES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x8200, 0x0400, 0x7BFF, 0xFBFF]
"""float16: zeros, subnormals, the least normal and the largest numbers, of both signs."""


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q2_0"])
def test_scales_keep_every_bit(kind):
    weight = weight_of(kind, len(BITS_OF_SCALES))
    scale = torch.tensor(np.array(BITS_OF_SCALES, np.uint16).view(np.int16)).view(torch.float16)[:, None]
    found = read(kind, blocks_of(dataclasses.replace(weight, scale=scale)))
    assert torch.equal(found.scale.view(torch.int16), scale.view(torch.int16))
    assert torch.equal(found.q, weight.q)


def changed(kind, **fields):
    """A weight of two rows in which one number is another."""
    weight = weight_of(kind, 2, 2)
    new = {name: getattr(weight, name).clone().float() for name in fields}
    for name, value in fields.items():
        new[name][1, 1] = value
    return dataclasses.replace(weight, **{n: t if n == "scale" else t.to(torch.uint8) for n, t in new.items()})


KNOWN = "those of llmq are 2, 4 and 8 bit symmetric, 4 bit asymmetric"
NO_FLOAT16 = "is no float16 number, and GGUF stores these; quantize with --format gguf"
UNSAYABLE = {
    "3 bit": (random_weight(8, 64, 2, 3), True, f"no block type of GGUF has 3-bit symmetric codes; {KNOWN}"),
    "8 bit asymmetric": (random_weight(8, 64, 2, 8, False), False, "no block type .* has 8-bit asymmetric codes"),
    "groups of 16": (
        random_weight(8, 64, 4),
        True,
        "a block of Q4_0 holds 32 weights, so groups of 16 do not fit; use --group-size 32",
    ),
    "groups of 48": (random_weight(8, 96, 2), True, "a block .* groups of 48 do not fit; use --group-size 32"),
    "2 bit in groups of 32": (
        random_weight(8, 64, 2, 2),
        True,
        "a block of Q2_0 holds 64 weights, so groups of 32 do not fit; use --group-size 64",
    ),
    "act order": (
        dataclasses.replace(random_weight(8, 64, 2), group_of=torch.arange(64, dtype=torch.int32) % 2),
        True,
        "a block of Q4_0 holds 32 consecutive inputs of one group",
    ),
    "a row of half a block": (random_weight(8, 32, 1, 2), None, "a block of Q2_0 holds 64 consecutive inputs"),
    "a scale with 12 digits": (changed("Q4_0", scale=1 + 2**-11), True, f"a scale {NO_FLOAT16}"),
    "a scale above all": (changed("Q8_0", scale=65536.0), True, f"a scale {NO_FLOAT16}"),
    "a scale below all": (changed("Q2_0", scale=2**-25), True, f"a scale {NO_FLOAT16}"),
    "no number": (changed("Q4_0", scale=float("nan")), True, f"a scale {NO_FLOAT16}"),
    "a product of 14 digits": (changed("Q4_1", scale=2047 / 1024, zero=7), False, f"scale \\* zero {NO_FLOAT16}"),
    "a product above all": (changed("Q4_1", scale=8192.0, zero=9), False, f"scale \\* zero {NO_FLOAT16}"),
}


@pytest.mark.parametrize("case", UNSAYABLE)
def test_what_no_block_can_store_is_refused_when_written(case):
    weight, symmetric, reason = UNSAYABLE[case]
    with pytest.raises(CheckpointError, match=f"^{re.escape(NAME)}: {reason}") as caught:
        blocks_of(weight, symmetric is not False, -1 if symmetric is None else None)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_not_what_its_scheme_says_does_not_pass_for_the_same(symmetric):
    """Zero points are not written in Q4_0. Whoever writes reads back and compares."""
    weight = changed("Q4_1", zero=9)
    found = read("Q4_1", blocks_of(weight, False)) if not symmetric else read("Q4_0", blocks_of(weight, True))
    assert gguf.is_same(found, weight) != symmetric


DAMAGE = {
    "floats": lambda t: t.float(),
    "int8": lambda t: t.view(torch.int8),
    "flat": lambda t: t.flatten(),
    "three dimensions": lambda t: t[None],
    "no rows": lambda t: t[:0],
    "no blocks": lambda t: t[:, :0],
    "a byte short": lambda t: t[:, :-1],
    "an infinite scale": lambda t: t.index_fill(1, torch.tensor([1]), 0x7C).index_fill(1, torch.tensor([0]), 0),
    "a scale that is no number": lambda t: t.index_fill(1, torch.tensor([1]), 0xFF),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_do_not_fit_are_refused(case, kind):
    scheme = gguf.schemes_of({"types": {NAME: kind}}, [NAME])[NAME]
    blocks = blocks_of(weight_of(kind, 4, 2), KINDS[kind][1])
    check_refused(gguf, {f"{NAME}.blocks": DAMAGE[case](blocks)}, scheme)
    check_missing_parts(gguf, {f"{NAME}.blocks": blocks}, scheme)


@pytest.mark.parametrize(
    "head",
    [
        (0.5, 0.25),  # a zero point of -0.5
        (0.5, 1.0),  # -2
        (0.5, -8.0),  # 16
        (0.0, -1.0),
        (1.0, float("inf")),
        (1.0, float("nan")),
    ],
)
def test_a_least_weight_that_is_no_zero_point_is_refused(head):
    blocks = torch.frombuffer(bytearray(struct.pack("<ee", *head) + bytes(16)), dtype=torch.uint8)[None]
    check_refused(gguf, {f"{NAME}.blocks": blocks}, Scheme(4, 32, False), "load it in float")


def test_the_config_has_the_type_of_each_linear():
    schemes = dict.fromkeys(LAYERS, Scheme(4, -1, True)) | {LAYERS[0]: Scheme(8, 64, True)}
    config = gguf.hf_config(schemes | {NAME: Scheme(2, 128, True), "other": Scheme(4, 32, False)}, [])
    assert config["types"] == dict.fromkeys(LAYERS, "Q4_0") | {LAYERS[0]: "Q8_0", NAME: "Q2_0", "other": "Q4_1"}
    assert gguf.schemes_of(config, [LAYERS[1], "other", NAME]) == {
        LAYERS[1]: Scheme(4, 32, True),
        "other": Scheme(4, 32, False),
        NAME: Scheme(2, 64, True),
    }


@pytest.mark.parametrize("config", [{}, {"types": {NAME: "Q4_K"}}, {"types": {NAME: "2"}}])
def test_other_types_are_refused(config):
    with pytest.raises(CheckpointError, match=f"{NAME}: type .* is not one of Q4_0, Q4_1, Q8_0, Q2_0"):
        gguf.schemes_of(config, [NAME])
