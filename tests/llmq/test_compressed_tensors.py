"""The pack-quantized format: against itself, and against the package that defines it."""

import itertools

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from packed import random_weight
from stored import DTYPES, LAYERS, NAME, check_missing_parts, check_refused, check_round_trip
from transformers import CompressedTensorsConfig

from llmq.errors import CheckpointError
from llmq.formats import compressed_tensors
from llmq.formats.compressed_tensors import PARTS, encode, hf_config, schemes_of
from llmq.formats.scheme import Scheme
from llmq.settings import BITS
from llmq.weight import QuantizedWeight

# (rows, columns, group size): one row, prime rows, and columns that fill no word where one group spans the row
SHAPES = [(1, 1, -1), (7, 37, -1), (16, 64, -1), (1, 32, 32), (17, 96, 32), (13, 192, 64)]


SYMMETRIC, ASYMMETRIC = Scheme(4, 32, True), Scheme(4, 32, False)


def config_of(bits=4, group_size=32, symmetric=True, ignore=()):
    return hf_config({NAME: Scheme(bits, group_size, symmetric)}, [*ignore])


def weight_of(rows, columns, group_size, bits=4, symmetric=True, dtype=torch.float16):
    groups = 1 if group_size == -1 else columns // group_size
    return random_weight(rows, columns, groups, bits, symmetric, dtype, seed=rows + columns)


def upstream_scheme(bits, group_size, symmetric):
    config = QuantizationConfig.model_validate(config_of(bits, group_size, symmetric))
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
    tensors = encode(NAME, weight_of(7, 64, 32, symmetric=False), ASYMMETRIC)
    assert set(tensors) == {f"{NAME}.{part}" for part in PARTS}
    check_missing_parts(compressed_tensors, tensors, ASYMMETRIC)


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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("group_size", "symmetric"), [(-1, True), (32, True), (128, False)])
def test_the_config_passes_the_validation_of_its_readers(bits, group_size, symmetric):
    config = config_of(bits, group_size, symmetric, ["lm_head"])
    theirs = QuantizationConfig.model_validate(config)
    args = theirs.config_groups["group_0"].weights
    assert (args.num_bits, args.symmetric, theirs.ignore) == (bits, symmetric, ["lm_head"])
    assert (args.strategy, args.group_size) == (("channel", None) if group_size == -1 else ("group", group_size))
    hf = CompressedTensorsConfig.from_dict(config)
    assert hf.quantization_config.config_groups == theirs.config_groups
    assert hf.quantization_config.quantization_status.value == "compressed"


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), itertools.product(BITS, [-1, 64], [True, False]))
def test_schemes_of_reads_the_config_that_was_written(bits, group_size, symmetric):
    written = dict.fromkeys(LAYERS, Scheme(bits, group_size, symmetric))
    config = hf_config(written, ["lm_head"])
    assert schemes_of(config, LAYERS) == written
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]


def mixed():
    """Three schemes, in layers whose names begin alike."""
    eight = {name: Scheme(8, -1, True) for name in LAYERS if "self_attn" in name}
    two = {name: Scheme(2, 32, False) for name in LAYERS if "layers.1." in name}
    return dict.fromkeys(LAYERS, SYMMETRIC) | eight | two


def test_layers_of_several_schemes_are_groups_of_names_that_are_read_back():
    config = hf_config(mixed(), ["lm_head"])
    assert schemes_of(config, LAYERS) == mixed()
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(LAYERS)
    assert len(config["config_groups"]) == 3
    theirs = QuantizationConfig.model_validate(config)
    assert {args.weights.num_bits for args in theirs.config_groups.values()} == {2, 4, 8}
    with pytest.raises(CheckpointError, match=r"lm_head is packed, although the config ignores it"):
        schemes_of(config, ["lm_head"])


def test_the_config_does_not_depend_on_the_order_of_the_layers():
    shuffled = {name: mixed()[name] for name in reversed(LAYERS)}
    ours, theirs = (hf_config(schemes, []) for schemes in (mixed(), shuffled))
    assert sorted(map(str, ours["config_groups"].values())) == sorted(map(str, theirs["config_groups"].values()))


def group(bits, *targets, **changes):
    (made,) = config_of(bits)["config_groups"].values()
    return made | {"targets": [*targets]} | changes


# what the groups are for -> bits of model.layers.0.mlp.down_proj, as the compressed-tensors package decides
TARGETS = {
    "a name before patterns": ([group(2, "re:.*"), group(8, "model.layers.0.mlp.down_proj")], 8),
    "a pattern before the class": ([group(2, "Linear"), group(8, "re:.*down_proj$")], 8),
    "the first pattern in the alphabet": ([group(8, "re:.*down_proj$"), group(2, "re:.*_proj$")], 2),
    "patterns begin where names do": ([group(2, "re:mlp", "re:layers"), group(8, "Linear")], 8),
    "patterns may end before names do": ([group(8, "re:model.layers.0"), group(2, "Linear")], 8),
    "part of a name is no name": ([group(2, "down_proj", "mlp.down_proj"), group(8, "Linear")], 8),
    "a class that is not Linear": ([group(2, "Conv2d"), group(8, "Linear")], 8),
    "the format of the group": ([group(8, "Linear", format=None)], 8),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_group_of_a_layer_is_the_one_the_package_would_take(case):
    groups, bits = TARGETS[case]
    config = config_of() | {"config_groups": {f"group_{i}": each for i, each in enumerate(groups)}}
    name = "model.layers.0.mlp.down_proj"
    assert schemes_of(config, [name])[name].bits == bits
    if "format" not in case:  # which their configuration sets itself
        theirs = match_targets(name, torch.nn.Linear(1, 1), [t for each in groups for t in each["targets"]])[0]
        (taken,) = (each for each in groups if theirs in each["targets"])
        assert taken["weights"]["num_bits"] == bits


CONFIGS = {
    "another format": (
        {"config_groups": {"group_0": group(4, "Linear", format="int-quantized")}},
        "only pack-quantized",
    ),
    "no format": (
        {"format": None, "config_groups": {"group_0": group(4, "Linear", format=None)}},
        "only pack-quantized",
    ),
    "no group": ({"config_groups": {}}, f"{NAME} is packed, but no group of the config is meant for it"),
    "groups null": ({"config_groups": None}, "config_groups must map names to settings"),
    "groups in a list": ({"config_groups": [group(4, "Linear")]}, "config_groups must map names to settings"),
    "a group that is text": ({"config_groups": {"group_0": "W4A16"}}, "config_groups must map names to settings"),
    "a group without weights": (
        {"config_groups": {"g": group(4, "Linear", weights=None)}},
        "must map names to settings",
    ),
    "two groups for one target": (
        {"config_groups": {"a": group(4, "Linear"), "b": group(8, "Linear")}},
        "both name 'Linear'",
    ),
    "targets null": ({"config_groups": {"g": group(4) | {"targets": None}}}, "targets must be a list of names"),
    "targets of text": ({"config_groups": {"g": group(4) | {"targets": "Linear"}}}, "targets must be a list of names"),
    "targets of numbers": ({"config_groups": {"g": group(4, "Linear", 3)}}, "targets must be a list of names"),
    "targets elsewhere": (
        {"config_groups": {"g": group(4, "re:.*down_proj$")}},
        "no group of the config is meant for it",
    ),
    "ignored by name": ({"ignore": [NAME]}, f"{NAME} is packed, although the config ignores it"),
    "ignored by pattern": ({"ignore": ["lm_head", "re:.*mlp"]}, "although the config ignores it"),
    "ignored by class": ({"ignore": ["Linear"]}, "although the config ignores it"),
    "ignore of text": ({"ignore": "lm_head"}, "ignore must be a list of names"),
    "no pattern": ({"ignore": ["re:("]}, "is no regular expression"),
    "activations too": ({"config_groups": {"g": group(4, "Linear", input_activations={"num_bits": 8})}}, "unsupported"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_schemes_of_refuses_configs_it_does_not_read(case):
    changes, reason = CONFIGS[case]
    with pytest.raises(CheckpointError, match=reason) as caught:
        schemes_of(config_of() | changes, [NAME])
    assert len(str(caught.value).splitlines()) == 1


WEIGHTS = [
    {"num_bits": 5},
    {"num_bits": "4"},
    {"num_bits": True},
    {"num_bits": None},
    {"type": "float"},
    {"type": None},
    {"actorder": "group"},
    {"actorder": True},
    {"dynamic": True},
    {"group_size": "32"},
    {"group_size": -2},
    {"group_size": 0},
    {"group_size": 32.0},
    {"group_size": None},
    {"group_size": -1},
    {"strategy": "channel"},
    {"strategy": "block"},
    {"strategy": "tensor", "group_size": None},
    {"symmetric": 1},
    {"symmetric": "false"},
]


@pytest.mark.parametrize("changes", WEIGHTS, ids=str)
def test_schemes_of_refuses_weights_it_does_not_read(changes):
    config = config_of()
    config["config_groups"]["group_0"]["weights"] |= changes
    with pytest.raises(CheckpointError, match=r"unsupported|bits per weight|group size|must be true or false"):
        schemes_of(config, [NAME])


@pytest.mark.parametrize("order", [None, "weight", "static"])
def test_act_order_that_leaves_groups_contiguous_is_read(order):
    config = config_of()
    config["config_groups"]["group_0"]["weights"] |= {"actorder": order, "observer": "minmax", "scale_dtype": None}
    assert schemes_of(config, [NAME]) == {NAME: SYMMETRIC}
