import json
from pathlib import Path

import pytest
import torch
from hf_checkpoints import TABLE, quantization, with_packed_weight
from killed import quantize_together
from packed import rewrite
from safetensors.torch import load_file
from small_runs import run
from tiny import save_tiny
from trainings import moved, report_of, train

import llmq
from llmq.calibration.block_runner import Compute
from llmq.checkpoint.output_dir import PROGRESS, REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.qat.data import data_of
from llmq.qat.trainer import held_out_loss
from llmq.runtime.load import open_tokenizer
from llmq.runtime.rounded_inputs import round_inputs
from llmq.verification.check import check


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_an_original_model_is_quantized_and_then_trained(start, llama, text, tmp_path):
    options = {"bits": 2, "group_size": 32, "start": start, "loss": "kl", "calibration_samples": 20}
    out = train(llama, text, tmp_path / "out", **options)
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before
    seconds = report_of(out)["seconds"]
    assert min(seconds["start"], seconds["training"]) > 0
    assert seconds["total"] > seconds["start"] + seconds["training"]
    check(out, report_of(out)["digests"])
    assert sorted(path.name for path in out.iterdir() if "partial" in path.name) == []
    assert llmq.load(out, "cpu")(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_an_original_model_is_trained_with_a_zero_point_for_each_group(llama, text, tmp_path):
    options = {"bits": 2, "group_size": 32, "loss": "kl", "calibration_samples": 20}
    out = train(llama, text, tmp_path / "out", symmetric=False, **options)
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before
    zeros = Checkpoint(out).weight("model.layers.0.mlp.down_proj").zero
    assert len(zeros.unique()) > 1
    check(out, report_of(out)["digests"])


@pytest.mark.parametrize(
    ("learn", "kinds"),
    [
        ("scales", {"weight_scale", "weight"}),
        ("codes", {"weight_scale", "weight_packed", "weight"}),
        ("all", {"weight_scale", "weight_packed", "weight"}),
    ],
)
def test_what_is_asked_for_learns(learn, kinds, packed, text, tmp_path):
    rates = {"outside_rate": 0.01} if learn == "all" else {}
    out = train(packed, text, tmp_path / "out", learn=learn, **rates)
    assert moved(packed, out) == kinds
    old, new = (load_file(path / "model.safetensors") for path in (packed, out))
    assert torch.equal(old["lm_head.weight"], new["lm_head.weight"]) == (learn != "all")
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before


@pytest.mark.parametrize("kind", ["gptq", "mlx", "compressed-tensors"])
def test_the_format_stays(kind, llama, text, tmp_path):
    packed = run(llama, text, tmp_path / "packed", bits=4, format=kind)
    out = train(packed, text, tmp_path / "out")
    before, after = (json.loads((path / "config.json").read_text()) for path in (packed, out))
    assert before == after
    names = ({path.name for path in each.iterdir()} for each in (packed, out))
    assert next(names) - {PROGRESS} == next(names)
    assert moved(packed, out)


@pytest.mark.parametrize("learn", ["scales", "codes"])
def test_zero_points_that_are_no_codes_learn_with_the_scales(learn, llama, text, tmp_path):
    out = train(llama, text, tmp_path / "out", learn=learn, format="mlx", symmetric=False, bits=2)
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before
    weight = Checkpoint(out).weight("model.layers.0.mlp.down_proj")
    assert weight.has_real_zeros
    check(out, report_of(out)["digests"])


def test_embeddings_that_mlx_packed_are_dense_afterwards_and_the_settings_say_so(llama, text, tmp_path):
    start, table = with_packed_weight(llama, tmp_path / "start", TABLE)
    out = train(start, text, tmp_path / "out")
    assert TABLE in quantization(start, "quantization")
    assert quantization(out, "quantization") == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert torch.equal(load_file(out / "model.safetensors")[f"{TABLE}.weight"], table.dequantize(torch.float64).float())


def test_only_chosen_layers_change_but_norms_of_all(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", learn="codes", train_layers="layers.0.mlp.down_proj")
    old, new = (load_file(path / "model.safetensors") for path in (packed, out))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name for name in changed if "norm" not in name} == {
        f"model.layers.0.mlp.down_proj.{kind}" for kind in ("weight_packed", "weight_scale")
    }
    assert "model.layers.1.input_layernorm.weight" in changed


def test_training_that_makes_it_worse_changes_nothing_and_says_so(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", scale_rate=50.0)
    assert moved(packed, out) == set()
    assert "nothing was changed" in report_of(out)["notes"][-1]["note"]


def loss_of(packed, text, rounded, lora=0):
    """The held-out loss of a packed model as it is loaded, with rounded inputs or not."""
    settings = {"steps": 8, "batch": 4, "micro_batch": 2, "sequence_length": 32, "samples": 40}
    config = llmq.TrainConfig(str(packed), Path("out"), (str(text),), lora=lora, **settings)
    model = llmq.load(packed, "cpu", torch.float32)
    if rounded:
        round_inputs(model)
    data = data_of(config, open_tokenizer(packed, False), model)
    return held_out_loss(model, None, data, config, Compute(torch.device("cpu")))


@pytest.mark.parametrize("options", [{}, {"lora": 4, "calibration_samples": 20}])
def test_inputs_are_rounded_while_training_and_the_checkpoint_says_so(options, packed, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.core.device.multiplies_bfloat16", lambda _: False)
    out = train(packed, text, tmp_path / "out", activations=8, **options)
    before = report_of(out)["trained"]["held_out"][0]
    rounded, plain = (loss_of(packed, text, each) for each in (True, False))
    assert abs(before - rounded) < 0.1 * abs(rounded - plain)
    assert {scheme.rounded_inputs for scheme in Checkpoint(out).schemes.values()} == {"token"}
    again = train(out, text, tmp_path / "again", steps=1, **options)  # a start that rounds goes on rounding
    assert report_of(again)["trained"]["held_out"][0] == pytest.approx(loss_of(out, text, True), rel=1e-5)
    assert {scheme.rounded_inputs for scheme in Checkpoint(again).schemes.values()} == {"token"}


def test_embeddings_that_files_hold_twice_stay_equal(text, tmp_path):
    source = save_tiny(tmp_path / "source", "qwen2")
    packed = run(source, text, tmp_path / "packed", bits=4)
    rewrite(packed, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    (packed / REPORT).unlink()
    out = train(packed, text, tmp_path / "out", learn="all", outside_rate=0.01)
    old, new = (load_file(path / "model.safetensors") for path in (packed, out))
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(new["lm_head.weight"], old["lm_head.weight"])


def test_two_processes_train_together_on_twice_the_sequences(packed, text, tmp_path):
    settings = {"steps": 4, "batch": 4, "sequence_length": 32, "samples": 40, "scale_rate": 0.01, "checks": 2}
    settings |= {"activations": 8, "activation_scheme": "static"}
    config = llmq.TrainConfig(str(packed), tmp_path / "out", (str(text),), device="cpu", **settings)
    assert quantize_together(config, 2, program="train") == [0, 0]
    said = report_of(tmp_path / "out")["trained"]
    assert said["tokens_seen"] == 4 * 4 * 32 * 2
    assert said["held_out"][1] < said["held_out"][0]
    check(tmp_path / "out", report_of(tmp_path / "out")["digests"])


def test_a_dry_run_says_what_it_takes_and_writes_nothing(packed, llama, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llmq.qat.timing._LEAST", 0.001)
    for model in (packed, llama):
        train(model, text, tmp_path / "out", dry_run=True, learn="codes")
        told = capsys.readouterr().out
        assert "codes, scales, norms and biases" in told
        assert "memory    about" in told
        assert "time      about" in told
    assert not (tmp_path / "out").exists()
