"""llmq.load: quantized linears stay packed and compute what their dequantized values would."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from fake_gpu import GPU, FakeGpu, OnGpu
from packed import dequantized_model, logits, pack, rewrite, some_tokens
from safetensors.torch import load_file
from tiny import ARCHITECTURES, save_tiny
from torch import nn

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import RequestError
from llmq.core.settings import BITS
from llmq.runtime import load as loading
from llmq.runtime.load import _dtype_for, load_any
from llmq.runtime.packed_linear import PackedLinear

CASES = list(itertools.product(BITS, [True, False]))


@pytest.fixture(scope="module")
def checkpoints(llama, tmp_path_factory):
    """The tiny Llama packed at (bits, symmetric), made when first asked for."""
    made = {}

    def checkpoint(bits=4, symmetric=True):
        if (bits, symmetric) not in made:
            output = tmp_path_factory.mktemp("packed") / f"{bits}-{symmetric}"
            made[bits, symmetric] = pack(llama, output, bits=bits, symmetric=symmetric)
        return made[bits, symmetric]

    return checkpoint


def packed_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_logits_are_exactly_those_of_the_dequantized_model(llama, checkpoints, bits, symmetric):
    directory = checkpoints(bits, symmetric)
    ids = some_tokens()
    expected = logits(dequantized_model(llama, directory), ids)
    assert torch.equal(logits(llmq.load(directory, "cpu"), ids), expected)


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize("symmetric", [True, False])
def test_few_tokens_take_the_int4_path_and_agree_up_to_bf16_rounding(llama, checkpoints, symmetric):
    directory = checkpoints(4, symmetric)
    ids = some_tokens(batch=1, length=64)
    expected = logits(dequantized_model(llama, directory), ids)
    actual = logits(llmq.load(directory, "cpu"), ids)
    assert actual.dtype == torch.float32
    assert 0 < float((actual - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_every_linear_of_the_blocks_holds_packed_words_and_no_dense_weight(checkpoints, bits, symmetric):
    model = llmq.load(checkpoints(bits, symmetric), "cpu")
    logits(model, some_tokens(1, 3))
    block = {2: 256, 3: 512, 4: 128, 5: 512, 6: 256, 8: 64}[bits]  # for groups of 32
    linears = packed_linears(model)
    assert len(linears) == 2 * 7
    assert [name for name, module in model.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    for linear in linears.values():
        padded = -(-linear.in_features // block) * block  # rows are padded to whole blocks
        row = padded * bits // 8 + linear.in_features // 32 * 4  # a group has a word of scale and zero point
        assert list(linear.parameters()) == []
        assert sum(tensor.nbytes for tensor in linear.state_dict().values()) == linear.out_features * row
        assert not any(buffer.is_floating_point() for buffer in linear.buffers())


def test_packed_linears_dequantize_to_what_the_file_says(checkpoints):
    directory = checkpoints(3, False)
    checkpoint = Checkpoint(directory)
    for name, linear in packed_linears(llmq.load(directory, "cpu")).items():
        assert torch.equal(linear.dequantize(), checkpoint.weight(name).dequantize())
        assert repr(linear) == f"PackedLinear(in={linear.in_features}, out={linear.out_features}, bits=3, group=32)"


def test_weights_for_a_gpu_are_decoded_on_it(checkpoints, monkeypatch):
    class SeenError(Exception):
        pass

    def make(name, weight, bias):
        assert isinstance(weight.q, OnGpu)
        raise SeenError

    monkeypatch.setattr(loading, "pick_device", lambda _: GPU)
    with FakeGpu(), pytest.raises(SeenError):
        llmq.load(checkpoints(), "cuda", make_linear=make)


@pytest.mark.parametrize("bits", [3, 8])
def test_generate_writes_what_the_dequantized_model_writes(llama, checkpoints, bits):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    prompt = some_tokens(batch=1, length=5)
    expected = dequantized_model(llama, checkpoints(bits)).generate(prompt, **options)
    assert expected.shape == (1, 29)
    assert torch.equal(llmq.load(checkpoints(bits), "cpu").generate(prompt, **options), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_few_tokens_are_multiplied_in_float32_where_there_is_a_compiler(llama, checkpoints, bits, symmetric):
    directory = checkpoints(bits, symmetric)
    ids = some_tokens(batch=1, length=3)
    expected = logits(dequantized_model(llama, directory), ids)
    torch.testing.assert_close(logits(llmq.load(directory, "cpu"), ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("no_compiler")
def test_float32_is_float32_for_any_number_of_tokens(checkpoints, llama):
    ids = some_tokens(1, 100)
    expected = logits(dequantized_model(llama, checkpoints(4)), ids)[0]
    asked, default = llmq.load(checkpoints(4), "cpu", "float32"), llmq.load(checkpoints(4), "cpu")
    for length in (1, 64, 65):
        exact, fast = (logits(model, ids[:, :length])[0] for model in (asked, default))
        torch.testing.assert_close(exact, expected[:length], rtol=1e-5, atol=1e-5)
        assert torch.equal(fast, exact) == (length > 64)


@pytest.mark.parametrize(
    ("stored", "packed", "chosen"),
    [
        (torch.float32, True, torch.bfloat16),  # the kernels do not take float32
        (torch.float16, True, torch.float16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, False, torch.float32),  # an original runs without them
    ],
)
def test_on_a_gpu_the_dtype_is_the_files_own_where_the_kernels_take_it(stored, packed, chosen):
    cuda, config = torch.device("cuda"), SimpleNamespace(dtype=stored)
    assert _dtype_for(None, cuda, config, packed) == chosen
    assert _dtype_for(torch.float32, cuda, config, packed) == torch.float32  # asked for
    assert _dtype_for(None, torch.device("cpu"), config, packed) == torch.float32


def test_a_dtype_that_is_none_is_refused(checkpoints):
    with pytest.raises(RequestError, match="must be float32, bfloat16 or float16"):
        llmq.load(checkpoints(4), "cpu", "int4")


@pytest.mark.usefixtures("no_compiler")
def test_generate_runs_on_the_int4_path(checkpoints):
    model = llmq.load(checkpoints(4), "cpu")
    text = model.generate(some_tokens(batch=2, length=5), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert text.shape == (2, 14)
    assert all(linear._int4 is not None for linear in packed_linears(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_biases_tied_embeddings_and_source_dtypes_survive(tmp_path, dtype):
    source = save_tiny(tmp_path / "source", "qwen2", dtype)
    directory = pack(source, tmp_path / "packed")
    model, dense = llmq.load(directory, "cpu"), dequantized_model(source, directory)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in ("q_proj", "k_proj", "v_proj"):
        ours, theirs = (m.model.layers[1].self_attn.get_submodule(name).bias for m in (model, dense))
        assert torch.equal(ours.float(), theirs)
        assert bool(ours.any())
    # Not to the bit: a dense linear adds its bias before the products, a packed one after them.
    torch.testing.assert_close(logits(model, some_tokens()), logits(dense, some_tokens()), rtol=1e-4, atol=1e-4)


def test_a_stored_buffer_is_loaded_like_a_weight(tmp_path, monkeypatch):
    shape = {"sliding_window": 8, "global_head_dim": 16, "num_global_key_value_heads": 2}
    shape |= {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    shape |= {"layer_types": ["sliding_attention", "full_attention"]}
    monkeypatch.setitem(ARCHITECTURES, "gemma4", ("gemma4_text", shape))
    source = save_tiny(tmp_path / "source", "gemma4")
    rewrite(source, lambda tensors: tensors["model.layers.1.layer_scalar"].fill_(0.5))
    directory = pack(source, tmp_path / "packed")
    model = llmq.load(directory, "cpu")
    assert [float(layer.layer_scalar) for layer in model.model.layers] == [1, 0.5]
    assert torch.equal(logits(model, some_tokens()), logits(dequantized_model(source, directory), some_tokens()))


def test_linears_that_cannot_be_packed_stay_as_they_were(tmp_path):
    source = save_tiny(tmp_path / "source", "llama-gqa", intermediate_size=80)
    directory = pack(source, tmp_path / "packed")
    model = llmq.load(directory, "cpu")
    assert {name.rpartition(".")[2] for name in packed_linears(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    stored = load_file(source / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert torch.equal(
            model.model.layers[1].mlp.get_submodule(name).weight, stored[f"model.layers.1.mlp.{name}.weight"]
        )
    assert torch.equal(logits(model, some_tokens()), logits(dequantized_model(source, directory), some_tokens()))


def test_one_group_per_row_loads_too(tmp_path, llama):
    directory = pack(llama, tmp_path / "packed", bits=8, group_size=-1)
    model = llmq.load(directory, "cpu")
    assert {linear.grid.shape[0] for linear in packed_linears(model).values()} == {1}
    assert torch.equal(logits(model, some_tokens()), logits(dequantized_model(llama, directory), some_tokens()))


def test_activations_take_the_dtype_that_was_asked_for(checkpoints):
    model = llmq.load(checkpoints(4), "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    exact = logits(llmq.load(checkpoints(4), "cpu"), some_tokens())
    ours = logits(model, some_tokens())
    assert ours.dtype == torch.bfloat16
    assert float((ours.float() - exact).norm() / exact.norm()) < 5e-2


def test_the_models_own_generation_settings_are_kept(tmp_path, llama, checkpoints):
    directory = pack(llama, tmp_path / "packed", bits=8)
    (directory / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 1}))
    model = llmq.load(directory, "cpu")
    assert model.generation_config.max_new_tokens == 3
    assert not model.training


def test_load_any_opens_packed_and_original_models_with_their_tokenizer(llama, checkpoints):
    for spec, packed in ((llama, 0), (checkpoints(4), 14)):
        model, tokenizer = load_any(str(spec), "cpu")
        assert len(packed_linears(model)) == packed
        assert tokenizer.decode(tokenizer("a word")["input_ids"]) == "a word"


@pytest.mark.parametrize("device", ["tpu", "", "cuda0"])
def test_unknown_devices_are_refused(checkpoints, device):
    with pytest.raises(RequestError, match="device must be one of auto, cpu, cuda"):
        llmq.load(checkpoints(4), device)


@torch.no_grad()
def test_casting_the_model_leaves_the_scales_as_they_were_stored(llama, tmp_path):
    model = llmq.load(pack(llama, tmp_path / "packed"), device="cpu")
    before = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    model.to(torch.bfloat16).to(torch.float32)
    assert len(before) == 14
    assert all(torch.equal(before[n], model.get_submodule(n).dequantize()) for n in before)


def test_a_hub_id_may_name_an_original_model(llama, monkeypatch):
    for module in ("llmq.runtime.load", "llmq.models.model_source"):
        monkeypatch.setattr(f"{module}.locate", lambda *_: llama)
    model, ids = llmq.load("some/model", "cpu"), some_tokens()
    assert torch.equal(logits(model, ids), logits(load_any(str(llama), "cpu")[0], ids))
    assert not packed_linears(model)


def test_a_hub_id_may_name_a_packed_checkpoint(checkpoints, monkeypatch):
    monkeypatch.setattr("llmq.runtime.load.locate", lambda *_: checkpoints(3))
    assert packed_linears(llmq.load("some/model", "cpu"))
