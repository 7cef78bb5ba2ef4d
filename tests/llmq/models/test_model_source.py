"""Models are opened lazily and read exactly."""

from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from llmq.calibration.block_runner import Compute
from llmq.calibration.block_stream import stream
from llmq.calibration.texts import Tokens
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.timing import Clock
from llmq.models.locate import locate
from llmq.models.model_source import ModelSource
from llmq.models.safetensors_files import SafetensorsDirectory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The model of the `llama` fixture in several shards."""
    return save_tiny(tmp_path_factory.mktemp("sharded"), "llama-gqa", shard_size="100KB")


def loaded_names(source):
    """Parameters whose data is in memory."""
    parameters = source.skeleton.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if parameter.device.type != "meta"}


def test_opening_a_model_reads_no_tensor(llama, monkeypatch):
    read = []
    monkeypatch.setattr(SafetensorsDirectory, "read_all", lambda self, names: read.extend(names))
    source = ModelSource(str(llama))
    assert read == []
    assert loaded_names(source) == set()


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2"])
def test_streaming_holds_the_weights_of_one_block_at_a_time(name, tmp_path):
    source = ModelSource(str(save_tiny(tmp_path, name)))
    ids = torch.arange(40).view(2, 20)
    seen = []
    for block in stream(source, Tokens(ids, ids[:0]), Compute(CPU), Clock()):
        assert loaded_names(source) == set(source.block_tensor_names(block.name))
        seen.append(block.name)
    assert seen == [f"model.layers.{i}" for i in range(2)]
    assert loaded_names(source) == set()


def test_load_and_free_move_exactly_the_named_tensors(llama):
    source = ModelSource(str(llama))
    names = source.block_tensor_names("model.layers.1")
    source.load(names, CPU, torch.bfloat16)
    assert loaded_names(source) == set(names)
    expected = source.read(names[0]).bfloat16()
    assert torch.equal(source.skeleton.state_dict()[names[0]], expected)
    source.free(names)
    assert loaded_names(source) == set()


def test_shards_read_like_a_single_file(llama, sharded):
    one, many = SafetensorsDirectory(llama), SafetensorsDirectory(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert one.names() == many.names()
    assert all(torch.equal(one.read(name), many.read(name)) for name in one.names())
    assert {name: one.shape(name) for name in one.names()} == {name: many.shape(name) for name in one.names()}
    assert ModelSource(str(llama)).tensor_names == ModelSource(str(sharded)).tensor_names


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_buffers_are_real_and_those_of_the_whole_model(name, tmp_path):
    source = ModelSource(str(save_tiny(tmp_path, name)))
    expected = dict(tiny_model(name).named_buffers())
    buffers = dict(source.skeleton.named_buffers())
    assert buffers.keys() == expected.keys()
    assert any("inv_freq" in buffer for buffer in buffers)
    assert all(torch.equal(buffers[key], expected[key]) for key in expected)


def test_tied_embeddings_are_one_tensor_on_disk_and_in_memory(tmp_path):
    source = ModelSource(str(save_tiny(tmp_path, "qwen2")))
    assert "model.embed_tokens.weight" in source.tensor_names
    assert "lm_head.weight" not in source.tensor_names
    model = source.load_all(CPU, torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_untied_embeddings_are_two_tensors(llama):
    assert {"model.embed_tokens.weight", "lm_head.weight"} < set(ModelSource(str(llama)).outer_names())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma3"])
def test_load_all_gives_the_logits_of_from_pretrained_exactly(name, stored, tmp_path):
    save_tiny(tmp_path, name, dtype=stored, shard_size="100KB")
    ids = torch.arange(2, 66).view(2, 32)
    source = ModelSource(str(tmp_path))
    assert source.dtype == stored
    with torch.no_grad():
        ours = source.load_all(CPU, torch.float32)(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=ids).logits
    assert torch.equal(ours, theirs)


def test_a_revision_follows_the_name_of_a_hub_model(monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **kw: asked.update(kw, repo=repo) or "here")
    locate(QuantizeConfig("org/name", Path("out"), revision="v1.0").source)
    assert (asked["repo"], asked["revision"]) == ("org/name", "v1.0")
    locate("org/name")
    assert asked["revision"] is None
    with pytest.raises(RequestError, match="no such model"):
        locate("org/name@")
