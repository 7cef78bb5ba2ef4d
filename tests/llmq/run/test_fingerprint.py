import json
import shutil
from dataclasses import replace

import pytest
import torch

import llmq
from llmq.calibration.block_runner import Compute
from llmq.calibration.texts import Tokens
from llmq.models.model_source import ModelSource
from llmq.run.fingerprint import differences, fingerprint

TOKENS = Tokens(torch.arange(20).view(2, 10), torch.arange(10)[None])


@pytest.fixture
def config(llama, tmp_path):
    return llmq.QuantizeConfig(model=str(llama), output=tmp_path)


def of(config, tokens=TOKENS, training=TOKENS):
    compute = Compute(torch.device("cpu"))
    return fingerprint(config, ModelSource(config.model), tokens, training, compute)


def test_it_survives_being_written_down(config):
    config = replace(config, layer_bits=("down_proj=8",))
    assert differences(json.loads(json.dumps(of(config))), of(config)) == []


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"plot": True}, {"resume": True}, {"device": "cpu"}], ids=str)
def test_where_and_how_do_not_matter(changes, config, tmp_path):
    assert differences(of(config), of(replace(config, output=tmp_path / "other", **changes))) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "config.bits: 4, now 3"),
        ({"layer_bits": ("o_proj=8",)}, "config.layer_bits: (), now ('o_proj=8',)"),
    ],
    ids=str,
)
def test_what_does_is_named_with_both_values(changes, said, config):
    assert differences(of(config), of(replace(config, **changes))) == [said]


def test_so_do_token_ids_and_what_is_trained_on(config):
    other = replace(TOKENS, train=TOKENS.train + 1)
    assert [each.partition(":")[0] for each in differences(of(config), of(config, other))] == ["tokens"]
    assert [each.partition(":")[0] for each in differences(of(config), of(config, training=other))] == ["tokens"]


def test_a_single_changed_byte_at_either_end_of_the_weights_is_seen(config, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    source = ModelSource(config.model).directory
    for path in source.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    config, before = replace(config, model=str(copy)), of(config)
    assert differences(before, of(config)) == []
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert [each.partition(":")[0] for each in differences(before, of(config))] == ["source.model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "modeling_own.py"])
def test_so_does_what_says_how_the_weights_are_used(name, config, tmp_path):
    copy = shutil.copytree(config.model, tmp_path / "copy")
    config = replace(config, model=str(copy))
    before = of(config)
    with (copy / name).open("a") as file:
        file.write("\n")
    assert [each.partition(":")[0] for each in differences(before, of(config))] == [f"source.{name}"]
