"""What llmq does not quantize is refused when it is opened, with a sentence that helps."""

import copy
import json
import math
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from llmq.core.errors import CheckpointError, RequestError, WorkError
from llmq.models.decoder_blocks import refuse_without_linears
from llmq.models.model_source import ModelSource
from llmq.models.safetensors_files import INDEX

CPU = torch.device("cpu")
MOE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A good model in several shards."""
    return save_tiny(tmp_path_factory.mktemp("sharded"), "llama-gqa", shard_size="100KB")


@pytest.fixture
def model(sharded, tmp_path):
    """A sharded model that the test may break."""
    return shutil.copytree(sharded, tmp_path / "model")


def shards_of(model):
    return sorted(model.glob("*.safetensors"))


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(shard, edit):
    weights = load_file(shard)
    edit(weights)
    save_file(weights, shard, metadata={"format": "pt"})


def build(directory, model_type, **shape):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape)).save_pretrained(directory)
    return directory


def pickled(model):
    for shard in [*shards_of(model), model / INDEX]:
        shard.unlink()
    torch.save({}, model / "pytorch_model.bin")


def outside(model):
    index = json.loads((model / INDEX).read_text())
    shutil.move(shards_of(model)[0], model.parent / "elsewhere.safetensors")
    edit_json(model / INDEX, weight_map=dict.fromkeys(index["weight_map"], "../elsewhere.safetensors"))


def without_a_norm(model):
    name = "model.norm.weight"
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    edit_tensors(model / weight_map.pop(name), lambda weights: weights.pop(name))
    edit_json(model / INDEX, weight_map=weight_map)


def truncated(model):
    shard = shards_of(model)[2]
    shard.write_bytes(shard.read_bytes()[:-1])


def with_config(**changes):
    return lambda model: edit_json(model / "config.json", **changes)


# name -> (what is done to a good model, error, words of the message)
BROKEN = {
    "pickle": (pickled, RequestError, ["pickle", ".bin", "from_pretrained(DIR).save_pretrained(NEW_DIR)"]),
    "no weights": (lambda m: [p.unlink() for p in m.glob("model*")], RequestError, ["model.safetensors", INDEX]),
    "quantized": (
        with_config(quantization_config={"quant_method": "awq", "bits": 4}),
        RequestError,
        ["quantized already", "awq", "original weights"],
    ),
    "quantized by MLX": (
        with_config(quantization={"group_size": 64, "bits": 4}),
        RequestError,
        ["quantized already", "mlx", "original weights"],
    ),
    "missing shard": (lambda m: shards_of(m)[1].unlink(), CheckpointError, ["model-00002-of-", "missing", "fetch"]),
    "truncated shard": (truncated, CheckpointError, ["model-00003-of-", "corrupt or truncated"]),
    "no safetensors": (
        lambda m: shards_of(m)[1].write_bytes(b"\xff" * 999),
        CheckpointError,
        ["model-00002-of-", "corrupt or truncated"],
    ),
    "shard lacks a tensor": (
        lambda m: edit_tensors(shards_of(m)[0], lambda weights: weights.popitem()),
        CheckpointError,
        ["model-00001-of-", "which the index promises"],
    ),
    "index leads outside": (outside, CheckpointError, ["../elsewhere.safetensors", "inside the directory"]),
    "no index": (lambda m: (m / INDEX).write_text("{"), CheckpointError, [INDEX, "holds no readable"]),
    "missing tensor": (without_a_norm, CheckpointError, ["lacks 1 tensors", "model.norm.weight"]),
    "unknown type": (with_config(model_type="llamma"), RequestError, ["llamma"]),
    "not causal": (with_config(model_type="t5"), RequestError, ["not a causal language model"]),
    "bad field": (with_config(hidden_size="wide"), RequestError, ["hidden_size", "wide"]),
    "bad activation": (with_config(hidden_act="swish7"), RequestError, ["llama", "swish7"]),
    "no blocks": (with_config(num_hidden_layers=0), RequestError, ["0 decoder blocks"]),
    "no config": (lambda m: (m / "config.json").unlink(), RequestError, ["config.json"]),
    "malformed config": (lambda m: (m / "config.json").write_text("{"), RequestError, ["config.json", "JSON"]),
}


@pytest.mark.parametrize(("damage", "error", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_model_is_refused_when_opened_in_a_line_or_two(damage, error, said, model):
    ModelSource(str(model))
    damage(model)
    with pytest.raises(error) as caught:
        ModelSource(str(model))
    assert type(caught.value) is error
    message = str(caught.value)
    assert [words for words in said if words not in message] == []
    assert len(message.splitlines()) <= 2


def test_blocks_without_a_linear_are_refused():
    with pytest.raises(RequestError, match=r"Identity holds no nn\.Linear"):
        refuse_without_linears([torch.nn.Identity(), torch.nn.Identity()])


def test_two_lists_of_blocks_are_refused(llama, monkeypatch):
    built = AutoModelForCausalLM.from_config

    def with_a_second_list(*args, **options):
        model = built(*args, **options)
        model.model.adapters = copy.deepcopy(model.model.layers)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", with_a_second_list)
    with pytest.raises(RequestError, match=r"does not expose one list of 2 decoder blocks \(found 2\)"):
        ModelSource(str(llama))


def test_code_of_the_model_runs_only_with_the_flag(model, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = tmp_path / "ran"
    (model / "own.py").write_text(
        f"""from transformers import LlamaConfig, LlamaForCausalLM
open({str(ran)!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_json(model / "config.json", model_type="own", auto_map=auto_map)
    with pytest.raises(RequestError, match="--trust-remote-code"):
        ModelSource(str(model))
    assert not ran.exists()

    source = ModelSource(str(model), trust_remote_code=True)
    assert ran.exists()
    assert type(source.skeleton).__name__ == "OwnModel"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named_when_read(value, model):
    name = "model.layers.1.self_attn.o_proj.weight"
    shard = json.loads((model / INDEX).read_text())["weight_map"][name]
    edit_tensors(model / shard, lambda weights: weights[name][3].fill_(value))
    source = ModelSource(str(model))
    assert torch.isfinite(source.read("model.layers.0.self_attn.o_proj.weight")).all()
    with pytest.raises(WorkError, match=f"tensor {name} holds NaN or infinite"):
        source.load(source.block_tensor_names("model.layers.1"), CPU, torch.float32)


def test_weights_of_another_shape_are_refused_naming_the_tensor(model):
    edit_json(model / "config.json", intermediate_size=128)
    source = ModelSource(str(model))
    with pytest.raises(CheckpointError, match=r"size mismatch for model\.layers\.0\.mlp"):
        source.load(source.block_tensor_names("model.layers.0"), CPU, torch.float32)


def test_a_model_without_a_tokenizer_says_so(model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    source = ModelSource(str(model))
    with pytest.raises(CheckpointError, match="has no tokenizer that opens"):
        _ = source.tokenizer


def test_float8_weights_without_a_quantization_config_are_refused(tmp_path):
    source = save_tiny(tmp_path)
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RequestError, match=r"quantized already: it holds model\.layers\.0\.mlp\.up_proj\.weight in float8"
    ):
        ModelSource(str(source))
