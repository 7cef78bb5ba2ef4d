"""The quantization_config of the GPTQ format: what is written says the same to all readers, and theirs is read."""

import dataclasses
import itertools
import re

import pytest
from stored import LAYERS, NAME
from transformers import GPTQConfig

from llmq.core.errors import CheckpointError
from llmq.core.settings import GPTQ_BITS
from llmq.formats import gptq
from llmq.formats.scheme import Scheme


def stored(schemes):
    """The schemes as a reader of the file finds them."""
    return {name: dataclasses.replace(s, zero_offset=int(s.symmetric)) for name, s in schemes.items()}


@pytest.mark.parametrize(("bits", "size", "symmetric"), itertools.product(GPTQ_BITS, [-1, 32], [True, False]))
def test_the_config_is_read_back_and_accepted_by_transformers(bits, size, symmetric):
    schemes = dict.fromkeys(LAYERS, Scheme(bits, size, symmetric))
    config = gptq.hf_config(schemes, ["lm_head"])
    assert gptq.schemes_of(config, LAYERS) == stored(schemes)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert "dynamic" not in config
    theirs = GPTQConfig.from_dict(config)
    assert (theirs.bits, theirs.group_size, theirs.desc_act, theirs.sym) == (bits, size, False, symmetric)
    assert theirs.format == config["checkpoint_format"]


MIXED = dict.fromkeys(LAYERS, Scheme(4, 32, True))
MIXED |= {name: Scheme(8, 32, True) for name in LAYERS if "layers.1." in name}
MIXED |= {name: Scheme(2, -1, True) for name in LAYERS if "layers.3.self_attn" in name}
LEFT_OUT = ["model.layers.0.mlp.gate_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj"]


def test_layers_that_differ_are_rules_that_are_read_back():
    config = gptq.hf_config(MIXED, ["lm_head"])
    assert gptq.schemes_of(config, LAYERS) == stored(MIXED)
    assert (config["bits"], config["group_size"]) == (4, 32)  # of most
    assert sorted(config["dynamic"].values(), key=str) == [{"bits": 2, "group_size": -1}, {"bits": 8}]
    assert GPTQConfig.from_dict(config).bits == 4


def rule_for(config, name):
    """What a reader finds: negative rules first, then the first that fits from the beginning of the name."""
    rules = sorted(config["dynamic"], key=lambda rule: not rule.startswith("-:"))
    return next((rule for rule in rules if re.match(rule[2:], name)), None)


def test_rules_fit_the_names_of_fused_layers_and_no_others():
    config = gptq.hf_config(MIXED, LEFT_OUT)
    for name in ("mlp.gate_up_proj", "self_attn.qkv_proj"):
        assert config["dynamic"][rule_for(config, f"model.layers.1.{name}")] == {"bits": 8}
        assert rule_for(config, f"model.layers.0.{name}").startswith("-:")
        assert rule_for(config, f"model.layers.11.{name}") is None
        assert rule_for(config, f"other.model.layers.1.{name}") is None
    assert rule_for(config, "model.layers.1xself_attn.q_proj") is None
    assert rule_for(config, "model.layers.1.self_attn.q_proj_2") is None


def test_linears_left_in_float_share_one_rule_that_no_packed_layer_may_fit():
    """One: readers try every rule on every name, which takes too long where hundreds of linears are left out."""
    config = gptq.hf_config(MIXED, [*LEFT_OUT, "lm_head"])
    negative = [rule for rule in config["dynamic"] if rule.startswith("-:")]
    assert len(negative) == 1
    assert config["dynamic"][negative[0]] == {}
    assert [rule_for(config, name) for name in LEFT_OUT] == negative * 3
    assert rule_for(config, "lm_head") is None
    packed = [name for name in LAYERS if name not in LEFT_OUT]
    assert gptq.schemes_of(config, packed) == {name: stored(MIXED)[name] for name in packed}
    with pytest.raises(CheckpointError, match="is packed, although the rule '-:"):
        gptq.schemes_of(config, LAYERS)


def test_a_packed_head_is_said_to_be_one():
    assert gptq.hf_config(MIXED | {"lm_head": Scheme(4, 32, True)}, [])["lm_head"] is True
    assert gptq.hf_config(MIXED, ["lm_head"])["lm_head"] is False


def test_symmetric_and_asymmetric_layers_in_one_file_are_refused():
    with pytest.raises(CheckpointError, match="gptq stores one kind of zero points"):
        gptq.hf_config(MIXED | {NAME: Scheme(4, 32, False)}, [])


BASE = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
# foreign configs -> what they say of model.layers.0.mlp.up_proj
CONFIGS = {
    "nothing but bits": ({"bits": 3}, Scheme(3, 128, True, zero_offset=1)),
    "act order": (BASE | {"desc_act": True}, Scheme(4, 128, True, True, 1)),
    "version 2 by its old name": (BASE | {"format": "gptq_v2"}, Scheme(4, 128, True)),
    "the newer name first": (
        BASE | {"format": "gptq_v2", "checkpoint_format": "gptq"},
        Scheme(4, 128, True, zero_offset=1),
    ),
    "nulls": (BASE | {"format": None, "dynamic": None, "pack_dtype": None}, Scheme(4, 128, True, zero_offset=1)),
    "a rule without sign": (BASE | {"dynamic": {".*up_proj": {"bits": 8}}}, Scheme(8, 128, True, zero_offset=1)),
    "all a rule can say": (
        BASE | {"dynamic": {"+:.*": {"bits": 2, "group_size": 64, "sym": False, "desc_act": True, "damp_percent": 1}}},
        Scheme(2, 64, False, True, 1),
    ),
    "the first of two rules": (
        BASE | {"dynamic": {"+:.*mlp": {"bits": 8}, "+:.*": {"bits": 2}}},
        Scheme(8, 128, True, zero_offset=1),
    ),
    "rules begin where names do": (BASE | {"dynamic": {"+:mlp": {"bits": 8}}}, Scheme(4, 128, True, zero_offset=1)),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_of_other_tools_are_read(case):
    config, scheme = CONFIGS[case]
    assert gptq.schemes_of(config, [NAME]) == {NAME: scheme}


REFUSED = {
    "planar": ({"checkpoint_format": "gptq_p"}, "of the kind 'gptq_p'"),
    "marlin": ({"checkpoint_format": "marlin"}, "of the kind 'marlin'"),
    "other words": ({"pack_dtype": "int16"}, "in int16 words"),
    "5 bits": ({"bits": 5}, "5 bits per weight"),
    "bits of text": ({"bits": "4"}, "'4' bits per weight"),
    "bits true": ({"bits": True}, "True bits per weight"),
    "bits null": ({"bits": None}, "None bits per weight"),
    "group size 0": ({"group_size": 0}, "group size 0"),
    "group size -2": ({"group_size": -2}, "group size -2"),
    "group size of text": ({"group_size": "128"}, "group size '128'"),
    "sym as a number": ({"sym": 1}, "symmetric must be true or false; found 1"),
    "desc_act of text": ({"desc_act": "no"}, "act order must be true or false; found 'no'"),
    "rules in a list": ({"dynamic": [".*"]}, "dynamic must map names to settings"),
    "a rule that is a number": ({"dynamic": {".*": 8}}, "dynamic must map names to settings"),
    "a rule with 7 bits": ({"dynamic": {".*": {"bits": 7}}}, "7 bits per weight"),
    "a rule that leaves it out": ({"dynamic": {"+:.*": {}, "-:.*up": {}}}, "although the rule '-:.*up' leaves it out"),
    "no pattern": ({"dynamic": {"+:*": {}}}, "is no regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_are_not_read_are_refused_in_one_line(case):
    changes, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=re.escape(reason)) as caught:
        gptq.schemes_of(BASE | changes, [NAME])
    assert len(str(caught.value).splitlines()) == 1


def test_the_config_states_no_settings_that_only_a_method_could_know():
    config = gptq.hf_config({"a": Scheme(4, 32, True)}, [])
    assert not config.keys() & {"damp_percent", "true_sequential", "static_groups"}


def test_rules_for_experts_fit_the_linears_and_the_name_that_vllm_looks_up():
    experts = [f"model.layers.0.mlp.experts.{e}.{leaf}" for e in range(3) for leaf in ("w1", "w2", "w3")]
    schemes = dict.fromkeys(LAYERS, Scheme(4, 32, True)) | dict.fromkeys(experts, Scheme(8, 32, True))
    left_out = [name.replace("layers.0", "layers.1") for name in experts]
    config = gptq.hf_config(schemes, left_out)
    assert gptq.schemes_of(config, [*LAYERS, *experts]) == stored(schemes)
    assert config["dynamic"][rule_for(config, "model.layers.0.mlp.experts")] == {"bits": 8}
    assert rule_for(config, "model.layers.1.mlp.experts").startswith("-:")
    assert sum(map(len, config["dynamic"])) < 300  # for three experts as for 256
