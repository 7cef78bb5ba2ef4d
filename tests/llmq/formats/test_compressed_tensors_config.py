"""The quantization_config of compressed-tensors: what is written, and which of other tools' are read or refused."""

import itertools
import re

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from stored import LAYERS, NAME
from transformers import CompressedTensorsConfig

from llmq.core.errors import CheckpointError
from llmq.core.settings import BITS
from llmq.formats.compressed_tensors import hf_config, schemes_of
from llmq.formats.scheme import Scheme

SYMMETRIC, ASYMMETRIC = Scheme(4, 32, True), Scheme(4, 32, False)


def config_of(bits=4, group_size=32, symmetric=True, ignore=()):
    return hf_config({NAME: Scheme(bits, group_size, symmetric)}, [*ignore])


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


def experts(prefix, count=3):
    return [f"{prefix}.experts.{e}.{leaf}" for e in range(count) for leaf in ("w1", "w2", "w3")]


def test_the_experts_of_a_module_are_one_pattern_under_the_names_that_engines_look_for():
    """vLLM looks for the model's own names of expert 0, SGLang always for gate_proj, up_proj, down_proj."""
    eight, four, plain = experts("model.layers.0.mlp"), experts("model.layers.1.mlp"), "model.layers.0.mlp.up_proj"
    schemes = dict.fromkeys(eight, Scheme(8, 32, True)) | dict.fromkeys([*four, plain], Scheme(4, 32, True))
    config = hf_config(schemes, ["lm_head", *experts("model.layers.2.mlp")])
    assert schemes_of(config, schemes) == schemes
    targets = {group["weights"]["num_bits"]: group["targets"] for group in config["config_groups"].values()}
    (pattern,) = targets[8]
    for name in (*eight, "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.11.down_proj"):
        assert re.match(pattern.removeprefix("re:"), name)
    for name in (*four, "model.layers.0.mlp.shared_experts.gate_proj", "model.layers.0.mlp.experts.0.w1.bias"):
        assert not re.match(pattern.removeprefix("re:"), name)
    assert len(targets[4]) == 2
    assert [ignored[:3] for ignored in config["ignore"]] == ["lm_", "re:"]
    with pytest.raises(CheckpointError, match="is packed, although the config ignores it"):
        schemes_of(config, experts("model.layers.2.mlp")[:1])


def test_experts_with_settings_of_their_own_keep_their_names():
    names = experts("model.layers.0.mlp")
    schemes = dict.fromkeys(names[:3], Scheme(8, 32, True)) | dict.fromkeys(names[3:], Scheme(4, 32, True))
    config = hf_config(schemes, [])
    assert schemes_of(config, names) == schemes
    assert {target for group in config["config_groups"].values() for target in group["targets"]} == set(names)


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
    {"num_bits": 7},
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
