import pytest
import torch
from hf_checkpoints import change_config, opened
from mixtures import Mixtures
from packed import dequantized_model, logits, pack, some_tokens
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.formats.compressed_tensors import with_rounded_inputs
from llmq.models.model_source import ModelSource
from llmq.run.convert import ConvertConfig, convert
from llmq.runtime.fused_siblings import merge_linears
from llmq.runtime.load import load
from llmq.runtime.packed_experts import GroupedForward
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.rounded_inputs import round_inputs


def by_hand(x):
    """Each token in 255 steps over its own range."""
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def rounding(model):
    """The same model with linears in its blocks that round what they get."""
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, module=module: linear(by_hand(x), module.weight, module.bias)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_what_enters_each_packed_linear_is_rounded_and_nothing_else(bits, llama, tmp_path):
    packed = pack(llama, tmp_path / "out", bits=bits)
    model = load(packed, "cpu", torch.float32)
    plain = logits(model, some_tokens())
    round_inputs(model)
    expected = logits(rounding(dequantized_model(llama, packed)), some_tokens())
    torch.testing.assert_close(logits(model, some_tokens()), expected, rtol=1e-4, atol=1e-4)
    assert float((expected - plain).abs().max()) > 1e-3


def test_of_an_original_model_all_linears_of_its_blocks_are_meant(llama):
    original, other = (ModelSource(str(llama)).load_all(torch.device("cpu"), torch.float32) for _ in range(2))
    round_inputs(original)
    expected = logits(rounding(other), some_tokens())
    torch.testing.assert_close(logits(original, some_tokens()), expected, rtol=1e-5, atol=1e-5)


def with_rounded_experts(model):
    """The same mixture with packed linears that are told what a rounded input is by their callers."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            forward = module.forward
            module.forward = lambda x, forward=forward: forward(by_hand(x))
    return model


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_round_what_they_get(name, tmp_path):
    packed = Mixtures(tmp_path)(name)
    rounded, expected = (load(packed, "cpu", torch.float32) for _ in range(2))
    assert any(".experts." in linear for linear, module in rounded.named_modules() if isinstance(module, PackedLinear))
    round_inputs(rounded)
    by_callers = logits(with_rounded_experts(expected), some_tokens())
    torch.testing.assert_close(logits(rounded, some_tokens()), by_callers, rtol=1e-4, atol=1e-4)


def test_experts_that_run_together_are_asked_again_after_they_learned_to_round(tmp_path):
    model = load(Mixtures(tmp_path)("mixtral"), "cpu", torch.float32)
    grouped = next(m.forward for m in model.modules() if isinstance(getattr(m, "forward", None), GroupedForward))
    assert grouped.stacks is not None
    round_inputs(model)
    assert grouped.stacks is None


def test_merged_linears_round_their_common_input_once(llama, tmp_path):
    packed = pack(llama, tmp_path / "out")
    model = load(packed, "cpu", torch.float32)
    round_inputs(model)
    expected = logits(model, some_tokens())
    assert merge_linears(model)
    torch.testing.assert_close(logits(model, some_tokens()), expected)


@pytest.mark.parametrize("by", ["llmq", "transformers"])
def test_a_checkpoint_that_says_so_rounds_its_inputs(by, llama, tmp_path):
    packed = pack(llama, tmp_path / "out", bits=8)
    expected = load(packed, "cpu", torch.float32)
    round_inputs(expected)
    change_config(packed, lambda c: c.update(quantization_config=with_rounded_inputs(c["quantization_config"])))
    model = opened(packed) if by == "transformers" else load(packed, "cpu", torch.float32)
    torch.testing.assert_close(logits(model, some_tokens()), logits(expected, some_tokens()))


def test_stock_transformers_opens_such_a_checkpoint(llama, tmp_path):
    packed = pack(llama, tmp_path / "out", bits=8)
    change_config(packed, lambda c: c.update(quantization_config=with_rounded_inputs(c["quantization_config"])))
    stock, notes = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = logits(dequantized_model(llama, packed), some_tokens())
    difference = (logits(stock, some_tokens()) - plain).abs().max()
    assert 1e-4 < float(difference) < 0.2 * float(plain.abs().max())


def test_other_formats_do_not_take_over_what_they_cannot_say(llama, tmp_path):
    packed = pack(llama, tmp_path / "out")
    change_config(packed, lambda c: c.update(quantization_config=with_rounded_inputs(c["quantization_config"])))
    with pytest.raises(RequestError, match="cannot say that inputs are rounded"):
        convert(ConvertConfig(packed, tmp_path / "gptq", "gptq"))
    again = convert(ConvertConfig(packed, tmp_path / "again", "compressed-tensors"))
    assert all(scheme.rounded_inputs for scheme in Checkpoint(again).schemes.values())


@pytest.mark.parametrize("change", [{"dynamic": False}, {"num_bits": 4}, {"strategy": "tensor"}, {"symmetric": False}])
def test_inputs_that_are_rounded_in_another_way_are_refused(change, llama, tmp_path):
    packed = pack(llama, tmp_path / "out")

    def strange(config):
        config["quantization_config"] = with_rounded_inputs(config["quantization_config"])
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(change)

    change_config(packed, strange)
    with pytest.raises(CheckpointError, match="unsupported inputs"):
        load(packed, "cpu")
