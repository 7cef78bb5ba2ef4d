"""mlx_lm opens our checkpoints and computes what llmq does; we read its own (`make interop`).

MLX runs in float32 here. llmq multiplies more than 64 tokens in float32, so more are compared.
"""

import json

import pytest
import torch
from architectures.tiny_models import save_tiny as save_architecture
from compare_mlx import put_mlx
from hf_checkpoints import change_config
from packed import assert_same_weight, logits, pack, put_dequantized, random_weight, some_tokens
from test_demo import PARIS
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.formats.scheme import Scheme

pytestmark = pytest.mark.peers

DEMO = {
    "4 bit": {"bits": 4, "group_size": 64},
    "3 bit, and others": {"bits": 3, "group_size": 64, "layer_bits": ("layers.0.*=8", "down_proj=4", "o_proj=2")},
}


def theirs(directory):
    """The model and the tokenizer as mlx_lm opens them, in float32."""
    import mlx.core as mx
    from mlx_lm.utils import load_model, load_tokenizer

    model, _ = load_model(directory)
    model.set_dtype(mx.float32)
    return model, load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None


def their_logits(model, ids):
    import mlx.core as mx
    import numpy as np

    return torch.from_numpy(np.array(model(mx.array(ids.numpy()))))


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def kinds_of(model):
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.demo
@pytest.mark.parametrize("kind", DEMO)
def test_the_demo_model_computes_and_writes_the_same_in_mlx(tmp_path, kind):
    from mlx_lm import generate

    directory = pack("demo", tmp_path / "demo", format="mlx", **DEMO[kind])
    (model, tokenizer), ours = theirs(directory), llmq.load(directory, "cpu", torch.float32)
    assert list(kinds_of(model).values()).count("QuantizedLinear") == 30 * 7
    ids = AutoTokenizer.from_pretrained(directory)(PARIS, return_tensors="pt")["input_ids"]
    assert_close(their_logits(model, ids), logits(ours, ids))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    written = ours.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
    text = tokenizer.decode(written.tolist(), skip_special_tokens=True)
    assert generate(model, tokenizer, prompt, max_tokens=24) == text
    assert ("Paris" in text) == (kind == "4 bit")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen2", torch.bfloat16), ("qwen3", torch.float16), ("phi3", torch.float32)]
)
def test_every_width_computes_the_same_in_mlx(tmp_path, name, dtype, bits, symmetric):
    """Among them biases, tied embeddings and linears that other models hold as three."""
    source = save_tiny(tmp_path / "source", name, dtype)
    directory = pack(source, tmp_path / "packed", format="mlx", bits=bits, symmetric=symmetric)
    assert_close(their_logits(theirs(directory)[0], some_tokens()), logits(llmq.load(directory, "cpu"), some_tokens()))


# transformers 5 no longer writes these entries, which mlx_lm needs and the configs on the hub have.
MIXTURES = {
    "qwen3_moe": {"num_experts": 4, "head_dim": 16},
    "ernie4_5_moe": {},
    "granitemoe": {},
    "mellum": {"num_experts": 4},
    "mixtral": {"sliding_window": None},  # which mlx_lm ignores
    "olmoe": {},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_compute_the_same_in_mlx(tmp_path, name):
    save_architecture(name, tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config.update(MIXTURES[name]))
    options = {"format": "mlx", "layer_bits": ("experts.*=8", "o_proj=2")}
    directory = pack(tmp_path / "source", tmp_path / "packed", **options)
    model, _ = theirs(directory)
    assert "QuantizedSwitchLinear" in kinds_of(model).values()
    assert_close(their_logits(model, some_tokens()), logits(llmq.load(directory, "cpu"), some_tokens()))


def on_the_grid(directory):
    """Give every linear weights whose scales and zero points MLX finds exactly: each group uses all 16 codes' range."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    weights = {}
    for seed, (name, linear) in enumerate(m for m in model.named_modules() if isinstance(m[1], torch.nn.Linear)):
        rows, columns = linear.weight.shape
        weight = random_weight(rows, columns, columns // 32, dtype=torch.bfloat16, seed=seed)
        weight.q[:, ::32], weight.q[:, 1::32] = 0, 15
        weight.scale.copy_(weight.scale.sign() * 2.0 ** (weight.scale.abs().log2().round() - 2))
        linear.weight.data = weight.dequantize(torch.bfloat16)
        weights[name] = weight
    model.save_pretrained(directory)
    return weights


def converted_by_mlx(source, directory, embeddings=False):
    import mlx.nn as nn
    from mlx_lm import convert

    keep = None if embeddings else lambda _, module: isinstance(module, nn.Linear)
    convert(str(source), str(directory), quantize=True, q_group_size=32, q_bits=4, quant_predicate=keep)
    return directory


def test_zero_points_of_mlx_are_codes_where_they_are_whole(tmp_path):
    source = save_tiny(tmp_path / "source", "llama-gqa", torch.bfloat16)
    weights = on_the_grid(source)
    checkpoint = Checkpoint(converted_by_mlx(source, tmp_path / "theirs"))
    assert checkpoint.linears == sorted(weights)
    for name, weight in weights.items():
        assert_same_weight(checkpoint.weight(name), weight)
    ours = llmq.load(checkpoint.directory, "cpu")
    dense = put_dequantized(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), checkpoint.directory)
    assert torch.equal(logits(ours, some_tokens()), logits(dense, some_tokens()))
    assert_close(their_logits(theirs(checkpoint.directory)[0], some_tokens()), logits(ours, some_tokens()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_mlx_rounded_otherwise_computes_the_same(tmp_path, dtype):
    source = save_tiny(tmp_path / "source", "llama-gqa", dtype)
    directory = converted_by_mlx(source, tmp_path / "theirs")
    checkpoint = Checkpoint(directory)
    assert all(checkpoint.weight(name).has_real_zeros for name in checkpoint.linears)
    assert_close(their_logits(theirs(directory)[0], some_tokens()), logits(llmq.load(directory, "cpu"), some_tokens()))


# Those that mlx_lm opens in float with the same logits, from a tiny model as transformers 5 saves it.
DENSE = ("cohere", "ernie4_5", "glm4", "granite", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "llama")
DENSE += ("nemotron", "olmo2", "phi", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm")
OF_EXPERTS = sorted(MIXTURES.keys() - {"ernie4_5_moe"} | {"afmoe", "dots1", "qwen2_moe"})


@pytest.mark.parametrize("name", [*DENSE, *OF_EXPERTS])
def test_all_that_mlx_packs_computes_the_same(tmp_path, name):
    """Among it embeddings, routers, and stacks of experts under two names. Of Ernie, mlx_lm leaves out a tensor."""
    save_architecture(name, tmp_path / "source")
    # mlx_lm looks for the rotary base of many models only where transformers 4 wrote it.
    change_config(
        tmp_path / "source", lambda config: config.update(config["rope_parameters"], **MIXTURES.get(name, {}))
    )
    directory = converted_by_mlx(tmp_path / "source", tmp_path / "theirs", embeddings=True)
    model, _ = theirs(directory)
    kinds = set(kinds_of(model).values())
    assert "QuantizedEmbedding" in kinds
    assert ("QuantizedSwitchLinear" in kinds) == (name in OF_EXPERTS)
    assert_close(their_logits(model, some_tokens()), logits(llmq.load(directory, "cpu"), some_tokens()))


def test_our_settings_are_those_that_mlx_writes(tmp_path):
    source = save_tiny(tmp_path / "source", "llama-gqa", torch.bfloat16)
    ours, written = (
        json.loads((directory / "config.json").read_text())
        for directory in (pack(source, tmp_path / "ours", format="mlx"), converted_by_mlx(source, tmp_path / "theirs"))
    )
    for key in ("quantization", "quantization_config"):
        assert ours[key] == written[key] == {"group_size": 32, "bits": 4, "mode": "affine"}


def test_the_comparison_puts_what_mlx_makes_into_the_linears_of_blocks(tmp_path):
    source = save_tiny(tmp_path / "source", "llama-gqa")
    model, before = (AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    assert put_mlx(model, source, Scheme(4, 32, False)) == 4 + 2 * 16 / 32
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        change = float((new - old).detach().norm() / old.detach().norm())
        assert (0.01 < change < 0.2) if "_proj" in name else change == 0


def test_what_mlx_quantized_opens_there_again_after_a_training(tmp_path):
    """Its routers, whose bits its settings name, are dense afterwards."""
    save_architecture("qwen3_moe", tmp_path / "source")
    change_config(tmp_path / "source", lambda config: config.update(config["rope_parameters"], **MIXTURES["qwen3_moe"]))
    start = converted_by_mlx(tmp_path / "source", tmp_path / "theirs", embeddings=True)
    assert "model.layers.0.mlp.gate" in json.loads((start / "config.json").read_text())["quantization"]
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i % 97}" for i in range(4000)))
    options = {"steps": 2, "batch": 2, "micro_batch": 2, "sequence_length": 32, "samples": 20, "checks": 1}
    options |= {"scale_rate": 0.01, "device": "cpu"}
    out = llmq.train(llmq.TrainConfig(str(start), tmp_path / "out", (str(text),), **options))
    assert_close(their_logits(theirs(out)[0], some_tokens()), logits(llmq.load(out, "cpu"), some_tokens()))
