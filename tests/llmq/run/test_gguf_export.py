"""llmq.quantize and llmq.convert with --format gguf: the file has the codes, llmq opens it, nothing is lost."""

import json

import gguf
import numpy as np
import pytest
import torch
from commands import error_of, run_here
from gguf_models import TEMPLATE, file_in, known_words, save_model
from hf_checkpoints import change_config
from packed import logits, pack, some_tokens
from transformers import AutoTokenizer

import llmq
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.formats.gguf import TYPES
from llmq.models.gguf_header import read_header
from llmq.run.convert import ConvertConfig, convert
from llmq.runtime.load import open_tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WIDE = {"intermediate_size": 128}  # which groups of 64 divide
KINDS = {
    "4 bit": {},
    "8 bit": {"bits": 8},
    "2 bit": {"bits": 2},
    "some 8 bit": {"layer_bits": ("down_proj=8", "layers.0.self_attn.*=8")},
    "4 and 2 bit": {"layer_bits": ("down_proj=2",)},
}


@pytest.fixture(scope="module", autouse=True)
def _known_words():
    with known_words():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny Llamas by dtype."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_model(root / name, "llama-gqa", dtype, **WIDE) for name, dtype in DTYPES.items()}


def to_gguf(source, output, **options):
    """Quantize; `pack` would choose groups of 32, which 2 bit does not have."""
    return pack(source, output, format="gguf", group_size=128, **options)


def converted(source, output, target, **options):
    told = []
    return convert(ConvertConfig(source, output, target, **options), tell=told.append), told


@pytest.fixture(scope="module")
def packed(models, tmp_path_factory):
    """A float16 Llama at 4 bit: as a .gguf file, and as compressed-tensors."""
    root = tmp_path_factory.mktemp("packed")
    return to_gguf(models["float16"], root / "gguf"), pack(models["float16"], root / "twin")


@pytest.mark.parametrize(
    ("dtype", "kind"), [(dtype, "4 bit") for dtype in DTYPES] + [("float16", kind) for kind in [*KINDS][1:]]
)
def test_the_file_holds_what_compressed_tensors_holds(dtype, kind, models, tmp_path):
    output = to_gguf(models[dtype], tmp_path / "gguf", **KINDS[kind])
    twin = pack(models[dtype], tmp_path / "twin", group_size=64 if "2 bit" in kind else 32, **KINDS[kind])
    wanted, expected = Checkpoint(twin), logits(llmq.load(twin, "cpu"), some_tokens())
    for path in (output, file_in(output)):
        found = Checkpoint(path)
        assert found.linears == wanted.linears
        for name in wanted.linears:
            assert found.weight(name).bits == wanted.weight(name).bits
            assert torch.equal(found.weight(name).q, wanted.weight(name).q)
            assert torch.equal(found.weight(name).dequantize(), wanted.weight(name).dequantize())
        assert torch.equal(logits(llmq.load(path, "cpu"), some_tokens()), expected)


@pytest.mark.parametrize("source", [*DTYPES, "qwen2", "some 8 bit", "with other names"])
def test_there_and_back_the_bytes_are_the_same(source, models, tmp_path):
    """Scales are in float16 in the file, and in bfloat16 again after it. Qwen2 has biases and tied embeddings."""
    if source == "qwen2":
        model, options = save_model(tmp_path / "model", "qwen2", torch.bfloat16), {"bits": 8}
    else:
        model, options = models.get(source, models["bfloat16"]), KINDS.get(source, {})
    twin = pack(model, tmp_path / "twin", **options)
    path, told = converted(twin, tmp_path / "gguf", "gguf")
    assert path == file_in(tmp_path / "gguf")
    assert told == []
    back, told = converted(path if source == "float32" else path.parent, tmp_path / "back", "compressed-tensors")
    assert told == []
    assert (back / "model.safetensors").read_bytes() == (twin / "model.safetensors").read_bytes()
    before, after = (json.loads((each / "config.json").read_text()) for each in (twin, back))
    assert before["quantization_config"] == after["quantization_config"]
    assert before["dtype"] == after["dtype"]


def test_quantizing_and_converting_give_the_same_file(packed, tmp_path):
    path, _ = converted(packed[1], tmp_path / "out", "gguf")
    assert path.name == file_in(packed[0]).name == "float16-Q4_0.gguf"
    assert path.read_bytes() == file_in(packed[0]).read_bytes()


def test_the_tokenizer_is_the_same(packed, models):
    before, after = AutoTokenizer.from_pretrained(models["float16"]), open_tokenizer(file_in(packed[0]), False)
    text = "the other thing: Grüße, 你好 <eos> \n\n  x"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == text
    assert (before.eos_token_id, before.pad_token_id) == (after.eos_token_id, after.pad_token_id)
    assert after.chat_template == TEMPLATE


def test_gptq_needs_no_group_size(models, text_file, tmp_path):
    output, options = tmp_path / "out", ("--samples", "4", "--sequence-length", "32", "--effort", "fast")
    arguments = ("--model", models["float16"], "--output", output, "--calibration", text_file, *options)
    result = run_here("llmq.quantize", *arguments, "--format", "gguf", "--bits", "2")
    assert result.returncode == 0, result.stderr
    assert {scheme.group_size for scheme in Checkpoint(output).schemes.values()} == {64}
    report = json.loads((output / REPORT).read_text())
    assert report["notes"] == []
    assert report["copied"] == [file_in(output).name]
    assert len(report["groups"]) == 2 * 4
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [file_in(output).name, REPORT, "llmq_progress.jsonl"]
    )


@pytest.mark.parametrize("of", ["file", "directory"])
def test_the_commands_take_it(of, packed, text_file):
    path = file_in(packed[0]) if of == "file" else packed[0]
    some = ("--text", text_file, "--sequence-length", "64", "--limit", "2", "--json")
    figures = [run_here("llmq.eval", "--model", model, *some).stdout for model in (path, packed[1])]
    assert json.loads(figures[0])["perplexity"] == json.loads(figures[1])["perplexity"]
    about = json.loads(run_here("llmq.inspect", path, "--json").stdout)
    assert (about["quant_method"], about["bits"], len(about["layers"])) == ("gguf", [4], 14)
    assert about["packed_bytes"] == about["packed_weights"] * 18 / 32
    generated = run_here("llmq.generate", "--model", path, "--prompt", "the", "--no-chat", "--max-new-tokens", "3")
    assert generated.stdout.startswith("the")
    result = run_here("llmq.verify", path)
    assert result.returncode == 0, result.stderr


def test_verify_finds_a_changed_byte(packed, tmp_path):
    for path in packed[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray(file_in(tmp_path).read_bytes())
    content[read_header(file_in(tmp_path)).tensors["blk.1.ffn_up.weight"].start + 5] ^= 1
    file_in(tmp_path).write_bytes(content)
    assert run_here("llmq.verify", packed[0]).returncode == 0
    result = run_here("llmq.verify", tmp_path)
    assert result.returncode == 1
    assert "is not what was computed" in error_of(result)


def test_experts_are_stacked(tmp_path):
    model = save_model(tmp_path / "model", "qwen3_moe")
    change_config(model, lambda config: config.update(norm_topk_prob=True))  # as all have it; GGUF does not say
    twin = pack(model, tmp_path / "twin", format="auto")
    output = to_gguf(model, tmp_path / "gguf")
    stored = read_header(file_in(output)).tensors["blk.1.ffn_down_exps.weight"]
    assert (stored.kind, stored.shape) == (TYPES["Q4_0"].number, (64, 64, 4))
    assert json.loads((output / REPORT).read_text())["notes"] == []
    expected = logits(llmq.load(twin, "cpu"), some_tokens())
    assert torch.equal(logits(llmq.load(output, "cpu"), some_tokens()), expected)
    back, _ = converted(output, tmp_path / "back", "compressed-tensors")
    assert (back / "model.safetensors").read_bytes() == (twin / "model.safetensors").read_bytes()


def test_a_file_that_transformers_cannot_read_is_written_with_a_note(tmp_path):
    """It takes Mixtral's for a Llama. What was written is compared, but the model is not run from it."""
    model = save_model(tmp_path / "model", "mixtral")
    twin = Checkpoint(pack(model, tmp_path / "twin", format="auto"))
    output = to_gguf(model, tmp_path / "gguf")
    (note,) = json.loads((output / REPORT).read_text())["notes"]
    assert "cannot load it" in note["note"]
    assert "partial" not in note["note"]
    for expert, data in enumerate(tensor_of(file_in(output), "blk.1.ffn_up_exps.weight").data):
        wanted = twin.weight(f"model.layers.1.block_sparse_moe.experts.{expert}.w3").dequantize()
        assert np.array_equal(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_0), wanted.numpy())


def tensor_of(path, name):
    return next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
