"""AutoRound's checkpoints: which tensors each packing means, and how its config names layers."""

import dataclasses
import re

import pytest
from packed import assert_same_weight, random_weight
from stored import NAME

from llmq.core.errors import CheckpointError
from llmq.core.settings import GPTQ_BITS
from llmq.formats import awq, format_of, gptq, schemes_of
from llmq.formats.scheme import Scheme

BASE = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
# packing -> the format of the tensors, and what its zero points lack
PACKINGS = {
    "auto_round:auto_gptq": (gptq, 1),
    "auto_round:gptq": (gptq, 1),
    "auto_round:gptqmodel": (gptq, 0),
    "auto_round": (gptq, 0),
    "auto_round:auto_awq": (awq, 0),
    "auto_round:awq": (awq, 0),
}


def read(config, tensors):
    """The linear in these tensors, as a checkpoint reads it."""
    return format_of(config).decode(NAME, tensors, schemes_of(config, [NAME])[NAME])


def stored(form, weight, offset, size=32):
    """The tensors of a linear; of GPTQ's without the group indices, which AutoRound leaves out."""
    tensors = form.encode(NAME, weight, Scheme(weight.bits, size, symmetric=offset == 1))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("key", ["packing_format", "backend"])
def test_every_packing_is_read_as_what_its_tensors_are(packing, key):
    form, offset = PACKINGS[packing]
    weight, config = random_weight(32, 96, 3), BASE | {key: packing}
    assert format_of(config).TENSOR_SUFFIXES == form.TENSOR_SUFFIXES
    assert schemes_of(config, [NAME])[NAME].zero_offset == offset
    assert_same_weight(read(config, stored(form, weight, offset)), weight)


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel", "auto_round:auto_awq"])
def test_asymmetric_zero_points_are_read_as_they_are_zero_included(packing):
    weight = random_weight(32, 96, 3, symmetric=False)
    weight = dataclasses.replace(weight, zero=weight.zero.fill_(0))
    config = BASE | {"packing_format": packing, "sym": False}
    assert_same_weight(read(config, stored(PACKINGS[packing][0], weight, 0)), weight)


@pytest.mark.parametrize("bits", GPTQ_BITS)
@pytest.mark.parametrize("size", [-1, 32])
def test_without_a_packing_it_is_gptq_of_any_bits(bits, size):
    weight = random_weight(32, 96, 1 if size == -1 else 3, bits)
    assert_same_weight(read(BASE | {"bits": bits, "group_size": size}, stored(gptq, weight, 1, size)), weight)


def test_a_short_last_group_needs_no_indices_either():
    weight = random_weight(32, 96, 2)
    tensors = stored(gptq, weight, 1)
    assert read(BASE | {"group_size": 64}, tensors).group_of.tolist() == [0] * 64 + [1] * 32


def test_awq_of_other_bits_is_refused():
    config = BASE | {"packing_format": "auto_round:auto_awq", "bits": 8}
    with pytest.raises(CheckpointError, match="awq stores 4-bit weights; its config says 8 bits"):
        read(config, stored(awq, random_weight(32, 96, 3), 0))


def test_symmetry_is_taken_for_granted_where_nothing_is_said():
    assert schemes_of({"quant_method": "auto-round"}, [NAME]) == {NAME: Scheme(4, 128, True, zero_offset=1)}


UP, GATE, DOWN = (f"model.layers.0.mlp.{leaf}_proj" for leaf in ("up", "gate", "down"))
# extra_config -> (bits, group size) of up, gate and down
EXTRA = {
    "nothing": ({}, [(4, 32), (4, 32), (4, 32)]),
    "names": ({UP: {"bits": 8}, GATE: {"group_size": -1}}, [(8, 32), (4, -1), (4, 32)]),
    "a pattern": ({r".*mlp\.(up|gate).*": {"bits": 2, "group_size": 64}}, [(2, 64), (2, 64), (4, 32)]),
    "a name before patterns": ({".*": {"bits": 2, "group_size": 64}, UP: {"bits": 8}}, [(8, 32), (2, 64), (2, 64)]),
    "the first pattern that fits": ({".*up.*": {"bits": 3}, ".*proj": {"bits": 8}}, [(3, 32), (8, 32), (8, 32)]),
    "patterns fit anywhere": ({"(gate|down)": {"bits": 8}}, [(4, 32), (8, 32), (8, 32)]),
    "part of a name is no name": ({"model.layers.0.mlp.gate": {"bits": 16}}, [(4, 32), (4, 32), (4, 32)]),
    "layers that are not packed": (
        {"lm_head": {"bits": 16}, "model.router": {"bits": 16}},
        [(4, 32), (4, 32), (4, 32)],
    ),
    "nulls and other settings": ({UP: {"bits": None, "act_bits": 16, "sym": None}}, [(4, 32), (4, 32), (4, 32)]),
    "no config": (None, [(4, 32), (4, 32), (4, 32)]),
}


@pytest.mark.parametrize("case", EXTRA)
def test_layers_that_differ_are_named_or_fit_a_pattern(case):
    extra, expected = EXTRA[case]
    found = schemes_of(BASE | {"extra_config": extra}, [UP, GATE, DOWN])
    assert [(found[name].bits, found[name].group_size) for name in (UP, GATE, DOWN)] == expected


def test_a_layer_may_be_asymmetric_alone():
    found = schemes_of(BASE | {"extra_config": {UP: {"sym": False}}, "packing_format": "auto_round"}, [UP, DOWN])
    assert found == {UP: Scheme(4, 32, False), DOWN: Scheme(4, 32, True)}


REFUSED = {
    "floats": ({"data_type": "mx_fp"}, "of AutoRound's data types only int weights"),
    "quantized activations": ({"act_bits": 8}, "of AutoRound's data types only int weights"),
    "another packing": (
        {"packing_format": "auto_round:llm_compressor"},
        "AutoRound packing 'auto_round:llm_compressor'",
    ),
    "a packing that is a list": ({"packing_format": ["auto_round"]}, "AutoRound packing"),
    "packed although it says not": ({"extra_config": {NAME: {"bits": 16}}}, f"{NAME} is packed, although extra_config"),
    "floats in one layer": (
        {"extra_config": {".*up.*": {"data_type": "fp"}}},
        f"{NAME} is packed, although extra_config",
    ),
    "5 bits": ({"bits": 5}, "5 bits per weight"),
    "5 bits in one layer": ({"extra_config": {NAME: {"bits": 5}}}, "5 bits per weight"),
    "sym of text": ({"sym": "true"}, "symmetric must be true or false"),
    "group size null is 128, 0 is not": ({"group_size": 0}, "group size 0"),
    "layers in a list": ({"extra_config": [NAME]}, "extra_config must map names to settings"),
    "a layer that is a number": ({"extra_config": {NAME: 8}}, "extra_config must map names to settings"),
    "no pattern": ({"extra_config": {"*": {}}}, "is no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_in_one_line(case):
    changes, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=re.escape(reason)) as caught:
        schemes_of(BASE | changes, [NAME])
    assert len(str(caught.value).splitlines()) == 1
