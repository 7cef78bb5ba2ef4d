"""Tensors that a config ties but the files do not, and tensors that a model has no place for."""

import json

import pytest
import torch
from packed import logits, pack
from safetensors.torch import load_file, save_file
from small_runs import run
from tiny import save_tiny, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import llmq
from llmq.checkpoint.output_dir import REPORT
from llmq.core.errors import CheckpointError
from llmq.models.stored_names import has_no_place, is_computed
from llmq.verification.compare import VerifyConfig, verify

IDS = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))


def with_tensors(directory, change):
    """Change the tensors of a model on disk, in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def falsely_tied(tmp_path):
    """A model with a head of its own, whose config.json says that its embeddings are the head."""
    source = save_tiny(tmp_path / "source", "qwen2", tie_word_embeddings=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return source


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(falsely_tied, tmp_path):
    output = pack(falsely_tied, tmp_path / "packed", bits=8)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is False
    expected = logits(AutoModelForCausalLM.from_pretrained(falsely_tied, dtype=torch.float32), IDS)
    assert (logits(llmq.load(output, "cpu"), IDS) - expected).norm() < 0.05 * expected.norm()


def test_a_packed_checkpoint_with_a_head_of_its_own_uses_it(falsely_tied, tmp_path):
    output = pack(falsely_tied, tmp_path / "packed", bits=8)
    expected = logits(llmq.load(output, "cpu"), IDS)
    config = json.loads((output / "config.json").read_text())
    (output / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert torch.equal(logits(llmq.load(output, "cpu"), IDS), expected)


def test_a_reward_model_keeps_its_head_and_transformers_opens_the_result(tmp_path, text_file):
    source = save_tiny(tmp_path / "source", "qwen3", tie_word_embeddings=True)
    config = json.loads((source / "config.json").read_text())
    reward = {"architectures": ["Qwen3ForSequenceClassification"], "num_labels": 2, "pad_token_id": 0}
    (source / "config.json").write_text(json.dumps(config | reward))
    score = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    with_tensors(source, lambda tensors: tensors.update({"score.weight": score}))
    output = run(source, text_file, tmp_path / "packed", bits=8)
    notes = [entry["note"] for entry in json.loads((output / REPORT).read_text())["notes"]]
    assert any("1 tensors without a place in Qwen3ForCausalLM are copied: score.weight" in note for note in notes)
    expected, found = (
        AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32) for path in (source, output)
    )
    assert torch.equal(found.score.weight, score)
    with torch.no_grad():
        assert (found(IDS).logits - expected(IDS).logits).norm() < 0.1 * expected(IDS).logits.norm()
    assert verify(VerifyConfig(output))["without_place"] == ["score.weight"]


def test_a_tensor_that_the_model_ought_to_use_is_refused(tmp_path):
    source = save_tiny(tmp_path / "source")
    with_tensors(source, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.0\.self_attn\.q_proj\.bias, which the model"):
        pack(source, tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "placeless"),
    [
        ("score.weight", True),
        ("mtp.layers.0.norm.weight", True),
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.layers.2.mlp.up_proj.bias", False),
        ("model.layers.2.mlp.experts.0.weight", False),
        ("model.layers.1.self_attn.q_proj.lora_A.weight", False),
        ("model.norm.bias", False),
        ("lm_head", False),
    ],
)
def test_what_has_no_place(name, placeless):
    assert has_no_place(tiny_model("llama-gqa"), name) == placeless


def test_blocks_that_predict_further_tokens_have_none():
    model = tiny_model("llama-gqa")
    model.config.num_nextn_predict_layers = 1
    assert has_no_place(model, "model.layers.3.mlp.up_proj.weight")


def test_rotary_frequencies_that_old_files_hold_are_left_out(tmp_path):
    source = save_tiny(tmp_path / "source")
    with_tensors(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    output = pack(source, tmp_path / "packed")
    assert not any("inv_freq" in name for name in load_file(output / "model.safetensors"))
    assert json.loads((output / REPORT).read_text())["notes"] == []


def test_masks_that_old_files_hold_are_left_out(tmp_path):
    """The files of GPT-J and GPT-Neo have them; the model computes its masks now."""
    shape = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neo", **shape))
    for name in ("transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"):
        assert is_computed(model, name)
    assert not is_computed(model, "transformer.h.0.attn.attention.q_proj.bias")
