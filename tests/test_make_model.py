"""Check that the synthetic models for benchmarks are ordinary models."""

import json
from itertools import pairwise

import make_model
import pytest
import torch
from commands import error_of, run_here
from make_model import MakeConfig, byte_tokenizer, random_like
from safetensors.torch import load_file
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM

import llmq
from llmq.core.config import QuantizeConfig
from llmq.core.errors import WorkError
from llmq.models.model_source import ModelSource
from llmq.runtime.load import load, load_any


def made(directory, **options):
    make_model.make_model(MakeConfig(output=directory, **({"shape": "tiny"} | options)))
    return directory


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Make a tiny model in several shards."""
    return made(tmp_path_factory.mktemp("made") / "model", shard_gb=0.0002)


def test_every_tensor_is_in_the_shard_that_the_index_names(model):
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in model.glob("*.safetensors")}
    assert len(shards) > 3
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    assert index["weight_map"].keys() == set(ModelSource(str(model)).tensor_names)
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in shards.values() for t in tensors.values())


def test_weights_are_scaled_by_their_inputs_norms_are_near_one_and_no_two_are_equal(model):
    source = ModelSource(str(model))
    seen = set()
    for name in source.tensor_names:
        weight = source.read(name)
        assert weight.dtype == torch.bfloat16
        if weight.ndim == 1:
            assert abs(float(weight.float().mean()) - 1) < 0.05
            assert 0.05 < float(weight.float().std()) < 0.15
        else:
            assert abs(float(weight.float().std()) * weight.shape[1] ** 0.5 - 1) < 0.03
        start = tuple(weight.flatten()[:100].tolist())
        assert start not in seen
        seen.add(start)


def test_a_weight_larger_than_what_is_drawn_at_once_does_not_repeat(monkeypatch):
    monkeypatch.setattr(make_model, "_AT_ONCE", 1000)
    weight = random_like(torch.empty(300, 64), 0)
    assert len(set(weight.flatten().tolist())) > 0.99 * weight.numel()
    assert torch.linalg.matrix_rank(weight) == 64


def test_logits_are_finite_and_depend_on_the_tokens(model):
    network, tokenizer = load_any(str(model), "cpu")
    logits = network(tokenizer(["Hello, world", "Hello, wyrld"], return_tensors="pt").input_ids).logits
    assert logits.isfinite().all()
    assert 0.1 < float(logits.std()) < 10
    assert torch.equal(logits[0, :8], logits[1, :8])
    assert not torch.equal(logits[0, 8], logits[1, 8])


def test_activations_stay_of_ordinary_size_through_32_blocks(tmp_path):
    network, tokenizer = load_any(str(made(tmp_path / "deep", blocks=32)), "cpu")
    hidden = network(**tokenizer("some text", return_tensors="pt"), output_hidden_states=True).hidden_states[-2]
    assert 0.5 < float(hidden.float().square().mean().sqrt()) < 50


def test_the_command_makes_a_model_that_llmq_quantizes(tmp_path, text_file):
    done = run_here("make_model", "--shape", "tiny", "--kv-heads", 4, "--dtype", "float16", "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert " GB in 1 files" in done.stderr
    assert ModelSource(str(tmp_path / "a")).dtype == torch.float16
    output = llmq.quantize(QuantizeConfig(model=str(tmp_path / "a"), output=tmp_path / "b", method="rtn"))
    packed, original = load(output, device="cpu"), load_any(str(tmp_path / "a"), "cpu")[0]
    ids = torch.arange(2, 102)[None]
    expected = original(ids).logits
    difference = (packed(ids).logits - expected).norm() / expected.norm()
    assert 0 < difference < 0.5


def test_the_seed_alone_decides_on_the_numbers(model, tmp_path):
    again, other = made(tmp_path / "again", shard_gb=0.0002), made(tmp_path / "other", shard_gb=0.0002, seed=1)
    assert contents(again) == contents(model)
    assert contents(other).keys() == contents(model).keys()
    whole, another = (ModelSource(str(path)) for path in (made(tmp_path / "whole"), other))
    for name in whole.tensor_names:
        assert torch.equal(whole.read(name), ModelSource(str(model)).read(name))
        assert not torch.equal(whole.read(name), another.read(name))


def test_its_tokenizer_is_that_of_the_tests():
    """The code exists twice because tests/tiny.py is imported before llmq may be imported."""
    assert byte_tokenizer().backend_tokenizer.to_str() == tiny_tokenizer().backend_tokenizer.to_str()


TINY = {"hidden": 64, "intermediate": 32, "heads": 4, "kv_heads": 4, "vocabulary": 384, "experts": 16}


@pytest.mark.parametrize(("shape", "blocks", "mixtures"), [("qwen3-30b-a3b", 2, 2), ("deepseek-v3", 4, 1)])
def test_a_mixture_has_the_tensors_that_transformers_writes_and_each_expert_its_own(shape, blocks, mixtures, tmp_path):
    ours = made(tmp_path / "ours", shape=shape, blocks=blocks, dtype="float32", **TINY)
    model, loading = AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not any(loading.values())
    model.save_pretrained(tmp_path / "theirs")
    first, again = (load_file(path / "model.safetensors") for path in (ours, tmp_path / "theirs"))
    assert first.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    experts = {name: tensor for name, tensor in first.items() if ".mlp.experts." in name}
    assert len(experts) == mixtures * 3 * 16
    assert len({float(tensor[0, 0]) for tensor in experts.values()}) == len(experts)
    logits = model(torch.arange(2, 66)[None]).logits.detach()
    assert logits.isfinite().all()
    assert 0.1 < float(logits.std()) < 10


def test_experts_fill_the_shards(tmp_path):
    ours = made(tmp_path / "ours", shape="qwen3-30b-a3b", blocks=2, shard_gb=0.0002, **TINY)
    sizes = {path.name: sum(t.nbytes for t in load_file(path).values()) for path in ours.glob("*.safetensors")}
    in_order = [sizes[name] for name in sorted(sizes)]
    assert len(in_order) > 3
    assert all(a + b > 200_000 for a, b in pairwise(in_order))  # or one file would hold both


@pytest.mark.parametrize(
    ("shape", "billions", "active"), [("qwen3-30b-a3b", 30.5, 3.3), ("deepseek-v3", 671.0, 37.0), ("7b", 6.74, 6.74)]
)
def test_a_shape_has_as_many_weights_as_its_model_card_says(shape, billions, active):
    config = make_model._config(MakeConfig(make_model.Path("unused"), shape=shape))
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    sizes = {name: tensor.numel() for name, tensor in make_model._as_stored(state)}
    assert sum(sizes.values()) / 1e9 == pytest.approx(billions, rel=0.002)
    of_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    used = sum(sizes.values()) - of_experts * (1 - 8 / (getattr(config, "num_experts", None) or 256))
    assert used / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", 3], "multiple of 2 x heads; got hidden 128"),
        (["--kv-heads", 3], "multiple of kv-heads"),
        (["--vocabulary", 257], "at least 258"),
        (["--experts", 16], "a Llama has no experts"),
        (["--shape", "qwen3-30b-a3b", "--experts", 20], "experts must be a multiple of 8, at least 16"),
        (["--shape", "deepseek-v3", "--experts", 8], "experts must be a multiple of 8, at least 16"),
        (["--shape", "deepseek-v3", "--kv-heads", 64], "as many kv-heads as heads"),
        (["--blocks", 0], "must be positive; got"),
        (["--shard-gb", 0], "must be positive; got"),
        (["--seed", 65536], "between 0 and 65535"),
        (["--intermediate", 10**12], "GB left"),
    ],
)
def test_impossible_requests_are_refused_and_leave_nothing(options, message, tmp_path):
    done = run_here("make_model", "--shape", "tiny", "--output", tmp_path / "model", *options)
    assert done.returncode == 2
    assert message in error_of(done)
    assert not (tmp_path / "model").exists()


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("1")
    for output in (tmp_path, tmp_path / "precious"):
        done = run_here("make_model", "--shape", "tiny", "--output", output)
        assert done.returncode == 2
        assert "is not an empty directory" in error_of(done)
    assert contents(tmp_path) == {"precious": b"1"}


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_model_that_was_not_finished(error, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        assert not (tmp_path / "config.json").exists()
        raise error

    monkeypatch.setattr(make_model, "save_file", fail)
    with pytest.raises((WorkError, KeyboardInterrupt), match=r"No space left|^$"):
        made(tmp_path)
    assert contents(tmp_path) == {}
