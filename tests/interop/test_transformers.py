"""Plain transformers with the compressed-tensors package opens our checkpoints and computes exactly the same logits."""

import functools
import json

import pytest
import torch
from packed import dequantized_model, logits, pack, some_tokens
from safetensors.torch import load_file
from tiny import save_tiny, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

import llmq
from llmq.checkpoint.writer import Writer
from llmq.core.settings import BITS

ARCHITECTURES = ("llama-gqa", "qwen2", "gemma2", "phi3")
IDS = some_tokens(2, 19)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a function from (architecture, dtype) to the directory of a tiny model, made at its first call."""
    made = {}

    def source(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = save_tiny(tmp_path_factory.mktemp("source") / "model", name, dtype)
        return made[name, dtype]

    return source


def opened(directory, **options):
    """Open the model in float32, as any user of transformers would do."""
    model, notes = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not notes["missing_keys"]
    assert not notes["unexpected_keys"]
    assert not notes["mismatched_keys"]
    return model.eval()


def is_linear(module):
    return isinstance(module, nn.Linear)


def assert_opens_exactly(source, directory):
    model, expected = opened(directory), logits(dequantized_model(source, directory), IDS)
    assert torch.equal(logits(model, IDS), expected)
    assert bool(torch.isfinite(expected).all())
    ours = llmq.load(directory, "cpu", torch.float32)
    assert torch.equal(logits(ours, IDS), expected)
    return model


@pytest.mark.parametrize(("name", "bits"), [*zip(ARCHITECTURES * 2, (*BITS, 3, 4), strict=True)])
def test_logits_equal_those_of_the_dequantized_model(sources, tmp_path, name, bits):
    directory = pack(sources(name), tmp_path / "packed", bits=bits)
    model = assert_opens_exactly(sources(name), directory)
    assert model.config.quantization_config.quantization_config.config_groups["group_0"].weights.num_bits == bits


@pytest.mark.parametrize(("name", "dtype"), [("llama-gqa", torch.bfloat16), ("qwen2", torch.float16)], ids=str)
def test_half_precision_sources_keep_their_dtype_and_their_exactness(sources, tmp_path, name, dtype):
    directory = pack(sources(name, dtype), tmp_path / "packed")
    assert_opens_exactly(sources(name, dtype), directory)
    dtypes = {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()}
    assert dtypes == {dtype, torch.int32, torch.int64}
    assert AutoModelForCausalLM.from_pretrained(directory).dtype == dtype


@pytest.mark.parametrize("name", ["llama-gqa", "phi3"])
def test_other_bits_for_some_layers_open_exactly(sources, tmp_path, name):
    directory = pack(sources(name), tmp_path / "packed", layer_bits=("down_proj=8", "layers.0.*=3", "o_proj=2"))
    assert_opens_exactly(sources(name), directory)


@pytest.mark.parametrize("bits", BITS)
def test_one_scale_per_row_opens_exactly(sources, tmp_path, bits):
    assert_opens_exactly(sources("llama-gqa"), pack(sources("llama-gqa"), tmp_path / "p", bits=bits, group_size=-1))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_weights_open_exactly_when_dequantized_on_loading(sources, tmp_path, bits):
    directory = pack(sources("qwen2"), tmp_path / "packed", bits=bits, symmetric=False)
    model = opened(directory, quantization_config=CompressedTensorsConfig(dequantize=True))
    # With this option transformers computes the weights in the dtype of the scales, and then casts them.
    expected = dequantized_model(sources("qwen2"), directory, torch.float16)
    assert torch.equal(logits(model, IDS), logits(expected, IDS))


def test_several_shards_open_exactly(sources, tmp_path, monkeypatch):
    whole = pack(sources("qwen2"), tmp_path / "whole")
    monkeypatch.setattr("llmq.run.resume.Writer", functools.partial(Writer, shard_bytes=15_000))
    directory = pack(sources("qwen2"), tmp_path / "packed")
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    together = {name: tensor for shard in shards for name, tensor in load_file(directory / shard).items()}
    stored = load_file(whole / "model.safetensors")
    assert together.keys() == stored.keys()
    assert all(torch.equal(together[name], stored[name]) for name in stored)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert_opens_exactly(sources("qwen2"), directory)
    assert torch.equal(logits(llmq.load(directory, "cpu"), IDS), logits(llmq.load(whole, "cpu"), IDS))


def test_a_sharded_source_opens_exactly(tmp_path):
    source = save_tiny(tmp_path / "source", "llama-gqa", shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    assert_opens_exactly(source, pack(source, tmp_path / "packed", bits=3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_that_cannot_be_packed_stay_in_float_and_are_listed(tmp_path, name):
    source = save_tiny(tmp_path / "source", name, intermediate_size=80)
    directory = pack(source, tmp_path / "packed")
    assert_opens_exactly(source, directory)
    linears = {n: m.weight.shape for n, m in tiny_model(name, intermediate_size=80).named_modules() if is_linear(m)}
    odd = [n for n, shape in linears.items() if n == "lm_head" or shape[0] % 32 or shape[1] % 32]
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == sorted(odd)
    stored = load_file(directory / "model.safetensors")
    original = load_file(source / "model.safetensors")
    kept = {f"{n}.weight" for n in odd} & original.keys()
    assert len(kept) >= 3  # at least down_proj of every block
    assert all(torch.equal(stored[n], original[n]) for n in kept)
    assert {f"{n}.weight_packed" for n in linears if n not in odd} == {n for n in stored if n.endswith("_packed")}


def test_tied_embeddings_are_stored_once_and_stay_tied(sources, tmp_path):
    directory = pack(sources("qwen2"), tmp_path / "packed")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    model = opened(directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_quantized_model_generates_as_the_dequantized_one(sources, tmp_path):
    directory = pack(sources("llama-gqa"), tmp_path / "packed")
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    expected = dequantized_model(sources("llama-gqa"), directory).generate(IDS[:1], **options)
    assert torch.equal(opened(directory).generate(IDS[:1], **options), expected)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer("a word")["input_ids"]) == "a word"
