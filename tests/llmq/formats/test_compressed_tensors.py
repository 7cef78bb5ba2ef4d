"""The pack-quantized format: against itself, and against the package that defines it."""

import itertools
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from packed import random_weight
from stored import DTYPES, NAME, check_missing_parts, check_refused, check_round_trip

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.core.settings import BITS, TENSOR
from llmq.formats import compressed_tensors
from llmq.formats.compressed_tensors import TENSOR_SUFFIXES, encode, hf_config
from llmq.formats.scheme import Scheme

# (rows, columns, group size): one row, prime rows, and columns that fill no word where one group spans the row
SHAPES = [(1, 1, -1), (7, 37, -1), (16, 64, -1), (1, 32, 32), (17, 96, 32), (13, 192, 64)]


SYMMETRIC, ASYMMETRIC = Scheme(4, 32, True), Scheme(4, 32, False)


def weight_of(rows, columns, group_size, bits=4, symmetric=True, dtype=torch.float16):
    groups = 1 if group_size == -1 else columns // group_size
    return random_weight(rows, columns, groups, bits, symmetric, dtype, seed=rows + columns)


def upstream_scheme(bits, group_size, symmetric):
    config = QuantizationConfig.model_validate(hf_config({NAME: Scheme(bits, group_size, symmetric)}, []))
    return config.config_groups["group_0"]


def upstream_parts(tensors):
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(("symmetric", "bits"), itertools.product([True, False], BITS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_decode_gives_back_what_encode_was_given(rows, columns, group_size, dtype, symmetric, bits):
    weight = weight_of(rows, columns, group_size, bits, symmetric, dtype)
    check_round_trip(compressed_tensors, weight, Scheme(bits, group_size, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
def test_encode_writes_the_parts_of_the_format_in_their_dtypes(symmetric):
    weight = weight_of(17, 96, 32, 3, symmetric, torch.bfloat16)
    written = {name: (t.dtype, tuple(t.shape)) for name, t in encode(NAME, weight, Scheme(3, 32, symmetric)).items()}
    expected = {
        f"{NAME}.weight_packed": (torch.int32, (17, 9)),
        f"{NAME}.weight_scale": (torch.bfloat16, (17, 3)),
        f"{NAME}.weight_shape": (torch.int64, (2,)),
        f"{NAME}.weight_zero_point": (torch.int32, (2, 3)),
    }
    assert written == {name: part for name, part in expected.items() if not (symmetric and name.endswith("zero_point"))}


def test_encode_refuses_act_order_which_the_format_cannot_say():
    weight = random_weight(4, 8, 2)
    shuffled = QuantizedWeight(weight.q, weight.scale, weight.zero, 4, torch.arange(8, dtype=torch.int32) % 2)
    with pytest.raises(CheckpointError, match="contiguous groups"):
        encode(NAME, shuffled, Scheme(4, 4, True, act_order=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("symmetric", "bits"), itertools.product([True, False], BITS))
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_packages_own_decompressor_reads_the_same_weights_bit_for_bit(
    rows, columns, group_size, symmetric, bits, dtype
):
    weight = weight_of(rows, columns, group_size, bits, symmetric, dtype)
    parts = upstream_parts(encode(NAME, weight, Scheme(bits, group_size, symmetric)))
    theirs = PackedQuantizationCompressor.decompress(parts, upstream_scheme(bits, group_size, symmetric))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, weight.dequantize(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_packages_own_packer_makes_the_same_bytes(rows, columns, group_size, bits):
    weight = weight_of(rows, columns, group_size, bits, symmetric=False)
    ours = encode(NAME, weight, Scheme(bits, group_size, False))
    half = 2 ** (bits - 1)
    codes, zeros = ((part.to(torch.int16) - half).to(torch.int8) for part in (weight.q, weight.zero))
    assert torch.equal(ours[f"{NAME}.weight_packed"], pack_to_int32(codes, bits))
    assert torch.equal(ours[f"{NAME}.weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_package_compresses_the_dequantized_weights_to_the_same_tensors(bits, symmetric):
    weight = weight_of(13, 192, 64, bits, symmetric, torch.float32)
    half = 2 ** (bits - 1)
    state = {"weight": weight.dequantize(), "weight_scale": weight.scale}
    state["weight_zero_point"] = (weight.zero.to(torch.int16) - half).to(torch.int8)
    theirs = PackedQuantizationCompressor.compress(state, upstream_scheme(bits, 64, symmetric))
    ours = upstream_parts(encode(NAME, weight, Scheme(bits, 64, symmetric)))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[part], ours[part]) for part in ours)


def test_decode_refuses_a_linear_that_lacks_any_of_its_parts():
    scheme = replace(ASYMMETRIC, rounded_inputs=TENSOR)
    tensors = encode(NAME, replace(weight_of(7, 64, 32, symmetric=False), input_scale=torch.tensor([0.5])), scheme)
    assert set(tensors) == {f"{NAME}.{part}" for part in TENSOR_SUFFIXES}
    check_missing_parts(compressed_tensors, tensors, scheme)


@pytest.mark.parametrize("how", ["", "token"])
def test_decode_refuses_a_scale_of_inputs_that_the_config_does_not_want(how):
    tensors = encode(NAME, replace(weight_of(7, 64, 32), input_scale=torch.tensor([0.5])), SYMMETRIC)
    check_refused(compressed_tensors, tensors, replace(SYMMETRIC, rounded_inputs=how), "has a scale for its inputs")


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.tensor([0.0]), "not above 0"),
        (torch.tensor([-1.0]), "not above 0"),
        (torch.tensor([float("nan")]), "not above 0"),
        (torch.tensor([0.5, 0.5]), "expected floats"),
        (torch.tensor(0.5), "expected floats"),
        (torch.tensor([1]), "expected floats"),
    ],
)
def test_decode_refuses_a_scale_of_inputs_that_cannot_be_one(scale, words):
    tensors = encode(NAME, weight_of(7, 64, 32), SYMMETRIC) | {f"{NAME}.input_scale": scale}
    check_refused(compressed_tensors, tensors, replace(SYMMETRIC, rounded_inputs=TENSOR), words)


def test_decode_refuses_zero_points_that_a_symmetric_scheme_would_ignore():
    tensors = encode(NAME, weight_of(7, 64, 32, symmetric=False), ASYMMETRIC)
    check_refused(compressed_tensors, tensors, SYMMETRIC, "has zero points")


DAMAGE = {
    "packed as int64": ("weight_packed", lambda t: t.long()),
    "packed as bytes": ("weight_packed", lambda t: t.view(torch.uint8)),
    "packed a word short": ("weight_packed", lambda t: t[:, :-1]),
    "packed a row short": ("weight_packed", lambda t: t[:-1]),
    "packed flat": ("weight_packed", lambda t: t.flatten()),
    "scale as integers": ("weight_scale", lambda t: t.int()),
    "scale a row short": ("weight_scale", lambda t: t[:-1]),
    "scale with half the groups": ("weight_scale", lambda t: t[:, ::2]),
    "scale flat": ("weight_scale", lambda t: t.flatten()),
    "scale with a NaN": ("weight_scale", lambda t: t.clone().index_fill_(1, torch.tensor([1]), float("nan"))),
    "scale with an infinity": ("weight_scale", lambda t: t.clone().index_fill_(0, torch.tensor([6]), float("inf"))),
    "shape of three": ("weight_shape", lambda t: torch.tensor([7, 64, 1])),
    "shape of one": ("weight_shape", lambda t: torch.tensor(7)),
    "shape of floats": ("weight_shape", lambda t: torch.tensor([7.0, 64.0])),
    "shape transposed": ("weight_shape", lambda t: t.flip(0)),
    "shape empty": ("weight_shape", lambda t: torch.tensor([0, 0])),
    "zeros as bytes": ("weight_zero_point", lambda t: t.to(torch.uint8)),
    "zeros a group short": ("weight_zero_point", lambda t: t[:, :-1]),
    "zeros transposed": ("weight_zero_point", lambda t: t.T),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_decode_refuses_parts_that_do_not_fit_and_names_the_linear(damage):
    part, change = DAMAGE[damage]
    tensors = encode(NAME, weight_of(7, 64, 32, symmetric=False), ASYMMETRIC)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
    check_refused(compressed_tensors, tensors, ASYMMETRIC)


def test_decode_refuses_a_group_size_that_does_not_divide_the_inputs():
    tensors = encode(NAME, weight_of(7, 64, 64), SYMMETRIC)
    check_refused(compressed_tensors, tensors, Scheme(4, 48, True), "group size 48 does not divide 64")


@pytest.mark.parametrize(("bits", "words"), [(3, 7), (5, 11), (6, 13)])
def test_the_packing_of_versions_before_0_18_is_named(bits, words):
    """Whole codes in a word (ten of 3 bits), and two bits unused; now codes follow each other in one stream of bits."""
    weight = weight_of(32, 64, 32, bits)
    tensors = encode(NAME, weight, Scheme(bits, 32, True))
    tensors[f"{NAME}.weight_packed"] = torch.zeros(32, words, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=rf"before 0\.18, which puts {32 // bits} {bits}-bit codes into a word"):
        compressed_tensors.decode(NAME, tensors, Scheme(bits, 32, True))
