"""Training with one scale for the inputs of each linear."""

import pytest
import torch
from mixtures import Mixtures
from packed import logits, pack, some_tokens
from safetensors.torch import load_file
from trainings import FAST, moved, report_of, train
from transformers import AutoModelForCausalLM

import llmq
from llmq.calibration.block_runner import Compute
from llmq.checkpoint.describe import describe
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import RequestError
from llmq.qat.data import data_of
from llmq.qat.trainer import held_out_loss
from llmq.run.convert import ConvertConfig, convert
from llmq.runtime.fused_siblings import merge_linears
from llmq.runtime.load import open_tokenizer

STATIC = {"activations": 8, "activation_scheme": "static"}


def scales_in(directory):
    tensors = load_file(directory / "model.safetensors")
    return {name.removesuffix(".input_scale"): t for name, t in tensors.items() if name.endswith(".input_scale")}


@pytest.fixture
def static(packed, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.core.device.multiplies_bfloat16", lambda _: False)
    return train(packed, text, tmp_path / "static", **STATIC)


def test_each_linear_gets_a_scale_that_learns_and_siblings_share_it(static, packed, text, tmp_path):
    learned, linears = scales_in(static), Checkpoint(packed).linears
    assert learned.keys() == set(linears)
    assert {scheme.rounded_inputs for scheme in Checkpoint(static).schemes.values()} == {"tensor"}
    first = scales_in(train(packed, text, tmp_path / "first", **STATIC, steps=1, scale_rate=1e-9))
    assert all(not torch.equal(learned[name], first[name]) for name in linears)
    for parent, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        siblings = [learned[f"model.layers.0.{parent}.{name}_proj"] for name in names]
        assert len({float(each) for each in siblings}) == 1
    assert learned["model.layers.0.mlp.down_proj"] != learned["model.layers.0.mlp.up_proj"]
    assert {layer["inputs"] for layer in describe(static)["layers"]} == {"tensor"}


def test_a_loaded_checkpoint_computes_what_was_trained(static, text):
    config = llmq.TrainConfig(str(static), static / "out", (str(text),), **(FAST | {"device": "cpu"}))
    model = llmq.load(static, "cpu", torch.float32)
    data = data_of(config, open_tokenizer(static, False), model)
    loss = held_out_loss(model, None, data, config, Compute(torch.device("cpu")))
    before, after = report_of(static)["trained"]["held_out"]
    assert after < before
    assert loss == pytest.approx(after, rel=1e-5)
    expected = logits(model, some_tokens())
    assert merge_linears(model)
    torch.testing.assert_close(logits(model, some_tokens()), expected)


def test_transformers_and_int_quantized_take_the_scales_over(llama, text, tmp_path):
    ints = tmp_path / "ints"
    static = train(llama, text, tmp_path / "static", **STATIC, bits=8, group_size=-1, start="rtn")
    convert(ConvertConfig(static, ints, "int-quantized"))
    expected = logits(llmq.load(static, "cpu", torch.float32), some_tokens())
    assert torch.equal(logits(llmq.load(ints, "cpu", torch.float32), some_tokens()), expected)
    for each in (static, ints):
        stock, notes = AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32, output_loading_info=True)
        assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(stock, some_tokens()), expected, rtol=1e-2, atol=1e-2)
    with pytest.raises(RequestError, match="cannot say that inputs are rounded"):
        convert(ConvertConfig(static, tmp_path / "gptq", "gptq"))


def test_a_second_training_goes_on_from_the_stored_scales(static, text, tmp_path):
    again = train(static, text, tmp_path / "again", steps=1, scale_rate=1e-9)
    assert report_of(again)["trained"]["held_out"][0] == pytest.approx(report_of(static)["trained"]["held_out"][1])
    assert moved(static, again) <= {"weight"}  # of norms, where a tiny step can reach the next number
    some = train(static, text, tmp_path / "some", steps=1, scale_rate=1e-9, train_layers="down_proj")
    assert report_of(some)["trained"]["held_out"][0] == pytest.approx(report_of(static)["trained"]["held_out"][1])
    with pytest.raises(RequestError, match="one scale for all tokens"):
        train(static, text, tmp_path / "lora", lora=4)


def test_the_scales_are_written_though_no_state_was_better(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", **STATIC, steps=2, scale_rate=1e6)
    assert "but inputs got their scales" in report_of(out)["notes"][-1]["note"]
    assert scales_in(out).keys() == set(Checkpoint(packed).linears)
    llmq.load(out, "cpu")


def test_layers_that_do_not_learn_round_their_inputs_too(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", **STATIC, train_layers="down_proj")
    assert scales_in(out).keys() == set(Checkpoint(packed).linears)
    llmq.load(out, "cpu")


def test_what_cannot_have_such_scales_is_refused(packed, text, llama, tmp_path):
    with pytest.raises(RequestError, match="--activations 8"):
        train(packed, text, tmp_path / "out", activation_scheme="static")
    with pytest.raises(RequestError, match="without experts"):
        train(Mixtures(tmp_path)("mixtral"), text, tmp_path / "out", **STATIC)
    rounding = convert(ConvertConfig(pack(llama, tmp_path / "p"), tmp_path / "r", "compressed-tensors", activations=8))
    with pytest.raises(RequestError, match="a scale for each token"):
        train(rounding, text, tmp_path / "out", **STATIC)
    assert not (tmp_path / "out").exists()
