"""The pack-quantized format: against itself, and against the package that defines it."""

import itertools

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from packed import random_weight
from transformers import CompressedTensorsConfig

from llmq.config import BITS
from llmq.errors import CheckpointError
from llmq.formats.compressed_tensors import PARTS, decode, encode, hf_config, scheme_of
from llmq.weight import QuantizedWeight

NAME = "model.layers.0.mlp.up_proj"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# (rows, columns, group size): one row, prime rows, and columns that fill no word where one group spans the row
SHAPES = [(1, 1, -1), (7, 37, -1), (16, 64, -1), (1, 32, 32), (17, 96, 32), (13, 192, 64)]


def scheme(bits=4, group_size=32, symmetric=True):
    return scheme_of(hf_config(bits, group_size, symmetric, ["lm_head"]))


def weight_of(rows, columns, group_size, bits=4, symmetric=True, dtype=torch.float16):
    groups = 1 if group_size == -1 else columns // group_size
    return random_weight(rows, columns, groups, bits, symmetric, dtype, seed=rows + columns)


def upstream_scheme(bits, group_size, symmetric):
    config = QuantizationConfig.model_validate(hf_config(bits, group_size, symmetric, []))
    return config.config_groups["group_0"]


def upstream_parts(tensors):
    return {name.removeprefix(f"{NAME}."): tensor for name, tensor in tensors.items()}


def assert_same_weight(one, other):
    for a, b in ((one.q, other.q), (one.scale, other.scale), (one.zero, other.zero)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert one.bits == other.bits


@pytest.mark.parametrize(("symmetric", "bits"), itertools.product([True, False], BITS))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_decode_gives_back_what_encode_was_given(rows, columns, group_size, dtype, symmetric, bits):
    weight = weight_of(rows, columns, group_size, bits, symmetric, dtype)
    tensors = encode(NAME, weight, symmetric)
    assert_same_weight(decode(NAME, tensors, scheme(bits, group_size, symmetric)), weight)


@pytest.mark.parametrize("symmetric", [True, False])
def test_encode_writes_the_parts_of_the_format_in_their_dtypes(symmetric):
    weight = weight_of(17, 96, 32, 3, symmetric, torch.bfloat16)
    written = {name: (t.dtype, tuple(t.shape)) for name, t in encode(NAME, weight, symmetric).items()}
    expected = {
        f"{NAME}.weight_packed": (torch.int32, (17, 9)),
        f"{NAME}.weight_scale": (torch.bfloat16, (17, 3)),
        f"{NAME}.weight_shape": (torch.int64, (2,)),
        f"{NAME}.weight_zero_point": (torch.int32, (2, 3)),
    }
    assert written == {name: part for name, part in expected.items() if not (symmetric and name.endswith("zero_point"))}


@pytest.mark.parametrize("symmetric", [True, False])
def test_encode_leaves_its_input_alone(symmetric):
    weight = weight_of(7, 64, 32, 4, symmetric)
    q, scale, zero = weight.q.clone(), weight.scale.clone(), weight.zero.clone()
    encode(NAME, weight, symmetric)
    assert_same_weight(weight, QuantizedWeight(q, scale, zero, 4))


def test_encode_refuses_act_order_which_the_format_cannot_say():
    weight = random_weight(4, 8, 2)
    shuffled = QuantizedWeight(weight.q, weight.scale, weight.zero, 4, torch.arange(8, dtype=torch.int32) % 2)
    with pytest.raises(CheckpointError, match="contiguous groups"):
        encode(NAME, shuffled, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("symmetric", "bits"), itertools.product([True, False], BITS))
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_packages_own_decompressor_reads_the_same_weights_bit_for_bit(
    rows, columns, group_size, symmetric, bits, dtype
):
    weight = weight_of(rows, columns, group_size, bits, symmetric, dtype)
    parts = upstream_parts(encode(NAME, weight, symmetric))
    theirs = PackedQuantizationCompressor.decompress(parts, upstream_scheme(bits, group_size, symmetric))["weight"]
    assert theirs.dtype == dtype
    assert torch.equal(theirs, weight.dequantize(dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group_size"), SHAPES)
def test_the_packages_own_packer_makes_the_same_bytes(rows, columns, group_size, bits):
    weight = weight_of(rows, columns, group_size, bits, symmetric=False)
    ours = encode(NAME, weight, symmetric=False)
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
    ours = upstream_parts(encode(NAME, weight, symmetric))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[part], ours[part]) for part in ours)


def test_decode_refuses_a_linear_that_lacks_any_of_its_parts():
    tensors = encode(NAME, weight_of(7, 64, 32, symmetric=False), symmetric=False)
    assert set(tensors) == {f"{NAME}.{part}" for part in PARTS}
    for missing in tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != missing}
        with pytest.raises(CheckpointError, match=f"{missing} is missing"):
            decode(NAME, rest, scheme(symmetric=False))


def test_decode_refuses_zero_points_that_a_symmetric_scheme_would_ignore():
    tensors = encode(NAME, weight_of(7, 64, 32, symmetric=False), symmetric=False)
    with pytest.raises(CheckpointError, match="zero points"):
        decode(NAME, tensors, scheme())


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
    tensors = encode(NAME, weight_of(7, 64, 32, symmetric=False), symmetric=False)
    tensors[f"{NAME}.{part}"] = change(tensors[f"{NAME}.{part}"])
    with pytest.raises(CheckpointError, match=NAME):
        decode(NAME, tensors, scheme(symmetric=False))


def test_decode_refuses_a_group_size_that_does_not_divide_the_inputs():
    with pytest.raises(CheckpointError, match="group size 48 does not divide 64"):
        decode(NAME, encode(NAME, weight_of(7, 64, 64), True), scheme(group_size=48))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, True), (32, True), (128, False)])
def test_the_config_passes_the_validation_of_its_readers(bits, group_size, symmetric):
    config = hf_config(bits, group_size, symmetric, ["lm_head"])
    theirs = QuantizationConfig.model_validate(config)
    args = theirs.config_groups["group_0"].weights
    assert (args.num_bits, args.symmetric, theirs.ignore) == (bits, symmetric, ["lm_head"])
    assert (args.strategy, args.group_size) == (("channel", None) if group_size == -1 else ("group", group_size))
    hf = CompressedTensorsConfig.from_dict(config)
    assert hf.quantization_config.config_groups == theirs.config_groups
    assert hf.quantization_config.quantization_status.value == "compressed"


def test_scheme_of_reads_the_config_that_was_written():
    expected = {"num_bits": 3, "type": "int", "symmetric": False, "dynamic": False}
    assert scheme(3, 64, False) == expected | {"strategy": "group", "group_size": 64}
    assert scheme(3, -1, False) == expected | {"strategy": "channel"}


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "int-quantized"},
        {"format": None},
        {"config_groups": {}},
        {"config_groups": None},
        {"config_groups": {f"group_{i}": hf_config(4, 32, True, [])["config_groups"]["group_0"] for i in range(2)}},
    ],
    ids=["another format", "no format", "no group", "groups null", "two groups"],
)
def test_scheme_of_refuses_configs_it_does_not_read(changes):
    with pytest.raises(CheckpointError, match="only pack-quantized with one group"):
        scheme_of(hf_config(4, 32, True, []) | changes)


@pytest.mark.parametrize(
    "changes",
    [{"num_bits": 5}, {"type": "float"}, {"actorder": "group"}, {"group_size": "32"}, {"group_size": -2}],
    ids=str,
)
def test_scheme_of_refuses_weights_it_does_not_read(changes):
    config = hf_config(4, 32, True, [])
    config["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(CheckpointError, match="unsupported"):
        scheme_of(config)


def test_scheme_of_refuses_activation_quantization_and_other_targets():
    config = hf_config(4, 32, True, [])
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="unsupported"):
        scheme_of(config)
    config = hf_config(4, 32, True, [])
    config["config_groups"]["group_0"]["targets"] = ["re:.*down_proj$"]
    with pytest.raises(CheckpointError, match="only pack-quantized"):
        scheme_of(config)
