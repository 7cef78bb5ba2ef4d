import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hf_checkpoints import change_config
from packed import assert_same_weight, logits, pack, random_weight, some_tokens
from transformers import AutoModelForCausalLM

from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, RequestError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import format_of, int_quantized
from llmq.formats.scheme import Scheme
from llmq.run.convert import ConvertConfig, convert
from llmq.runtime.load import load


def scheme(bits=8, group_size=-1, **changes):
    return Scheme(bits, group_size, True, rounded_inputs="token").changed(changes)


@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 1), (4, 2), (8, 2)])
def test_what_is_written_is_read_back(bits, groups):
    weight = random_weight(48, 64, groups, bits)
    said = scheme(bits, -1 if groups == 1 else 32)
    tensors = int_quantized.encode("a.b", weight, said)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "a.b.weight": torch.int8,
        "a.b.weight_scale": torch.float16,
    }
    assert_same_weight(int_quantized.decode("a.b", tensors, said), weight)


def test_a_golden_weight():
    weight = QuantizedWeight(
        torch.tensor([[0, 1, 7, 8, 9, 15]], dtype=torch.uint8),
        torch.tensor([[0.5]]),
        torch.tensor([[8]], dtype=torch.uint8),
        4,
    )
    tensors = int_quantized.encode("w", weight, scheme(4))
    assert tensors["w.weight"].tolist() == [[-8, -7, -1, 0, 1, 7]]
    assert tensors["w.weight_scale"].tolist() == [[0.5]]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_package_reads_it_as_the_same_weights(bits):
    weight, said = random_weight(48, 64, 2, bits, dtype=torch.float32), scheme(bits, 32)
    settings = QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=32)
    theirs = BaseCompressor.get_value_from_registry(int_quantized.METHOD).decompress(
        {n.removeprefix("w."): t for n, t in int_quantized.encode("w", weight, said).items()},
        QuantizationScheme(targets=["Linear"], weights=settings, format=int_quantized.METHOD),
    )
    torch.testing.assert_close(theirs["weight"].float(), weight.dequantize())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"w.weight": t["w.weight"].float()}), "int8 matrix"),
        (lambda t: t.update({"w.weight": t["w.weight"] * 0 + 100}), "exceeds 4 bits"),
        (lambda t: t.pop("w.weight_scale"), "missing"),
        (lambda t: t.update({"w.weight_scale": t["w.weight_scale"][:1]}), "expected floats"),
    ],
)
def test_damaged_tensors_are_refused(change, words):
    tensors = int_quantized.encode("w", random_weight(48, 64, bits=4), scheme(4))
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        int_quantized.decode("w", tensors, scheme(4))


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, 32)])
def test_a_checkpoint_is_converted_and_computes_the_same_in_llmq_and_transformers(bits, group_size, llama, tmp_path):
    packed = pack(llama, tmp_path / "packed", bits=bits, group_size=group_size)
    rounding = convert(ConvertConfig(packed, tmp_path / "rounding", "compressed-tensors", activations=8))
    ints = convert(ConvertConfig(rounding, tmp_path / "ints", "int-quantized"))
    assert format_of(Checkpoint(ints).quantization) is int_quantized
    expected = logits(load(rounding, "cpu", torch.float32), some_tokens())
    assert torch.equal(logits(load(ints, "cpu", torch.float32), some_tokens()), expected)
    stock, notes = AutoModelForCausalLM.from_pretrained(ints, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = logits(load(packed, "cpu", torch.float32), some_tokens())
    assert float((logits(stock, some_tokens()) - plain).abs().max()) < 0.2 * float(plain.abs().max())
    back = convert(ConvertConfig(ints, tmp_path / "back", "compressed-tensors"))
    assert all(scheme.rounded_inputs for scheme in Checkpoint(back).schemes.values())
    assert_same_weight(*(Checkpoint(each).weight(Checkpoint(each).linears[0]) for each in (back, packed)))


def test_weights_without_rounded_inputs_are_not_stored_so(llama, tmp_path):
    packed = pack(llama, tmp_path / "packed", bits=8)
    with pytest.raises(CheckpointError, match="8-bit inputs"):
        convert(ConvertConfig(packed, tmp_path / "out", "int-quantized"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(RequestError, match="cannot say"):
        convert(ConvertConfig(packed, tmp_path / "out", "gptq", activations=8))


def test_a_config_without_rounded_inputs_is_refused(llama, tmp_path):
    packed = pack(llama, tmp_path / "packed", bits=8)
    ints = convert(ConvertConfig(packed, tmp_path / "ints", "int-quantized", activations=8))

    def forget(config):
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None

    change_config(ints, forget)
    with pytest.raises(CheckpointError, match="beside 8-bit inputs"):
        Checkpoint(ints)
