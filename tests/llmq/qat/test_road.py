import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed import rewrite
from safetensors.torch import load_file
from small_runs import run
from tiny import save_tiny, some_text
from transformers.models.llama.modeling_llama import LlamaMLP

import llmq
from llmq.calibration.block_runner import Compute
from llmq.checkpoint.output_dir import PROGRESS, REPORT, UNFINISHED
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import RequestError
from llmq.qat.data import data_of
from llmq.qat.outcome import Outcome
from llmq.qat.trainer import _Trainer, held_out_loss, shuffled
from llmq.runtime.load import open_tokenizer
from llmq.runtime.rounded_inputs import round_inputs
from llmq.verification.check import check

FAST = {"steps": 8, "batch": 4, "micro_batch": 2, "sequence_length": 32, "samples": 40, "checks": 4}
FAST |= {"device": "cpu"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "t.txt"
    path.write_text(some_text())
    return path


def train(model, text, output, **options):
    rates = {} if "lora" in options else {"scale_rate": 0.01}
    rates |= {"rate": 0.2} if options.get("learn") in ("codes", "all") else {}
    return llmq.train(llmq.TrainConfig(str(model), output, (str(text),), **(FAST | rates | options)))


def report_of(directory):
    return json.loads((directory / REPORT).read_text())


def moved(before, after):
    """The kinds of tensors that differ between two checkpoints."""
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert old.keys() == new.keys()
    return {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}


def stopped(*args, **kwargs):
    raise KeyboardInterrupt


def stopped_at_config(replace):
    """A move of files that is stopped when it comes to config.json."""

    def moved(source, target):
        if str(target).endswith("part/config.json"):
            raise KeyboardInterrupt
        replace(source, target)

    return moved


@pytest.fixture(scope="module")
def packed(llama, text, tmp_path_factory):
    return run(llama, text, tmp_path_factory.mktemp("packed") / "out", bits=2)


@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_an_original_model_is_quantized_and_then_trained(start, llama, text, tmp_path):
    options = {"bits": 2, "group_size": 32, "start": start, "loss": "kl", "calibration_samples": 20}
    out = train(llama, text, tmp_path / "out", **options)
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before
    check(out, report_of(out)["digests"])
    assert sorted(path.name for path in out.iterdir() if "partial" in path.name) == []
    assert llmq.load(out, "cpu")(torch.arange(3, 20)[None]).logits.isfinite().all()


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


def test_an_interrupted_training_ends_in_the_bytes_of_one_that_was_not(llama, text, tmp_path, monkeypatch):
    options = {"bits": 2, "group_size": 32, "learn": "codes", "calibration_samples": 20}
    whole = train(llama, text, tmp_path / "whole", **options)
    calls, step = [], _Trainer.training_step

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 11:  # in the sixth step; the last check was after the fourth
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(llama, text, tmp_path / "part", **options)
    assert not (tmp_path / "part" / "config.json").exists()
    with pytest.raises(RequestError, match="resume"):
        train(llama, text, tmp_path / "part", **options)
    with pytest.raises(RequestError, match=r"scale_rate: 0\.01, now 0\.02"):
        train(llama, text, tmp_path / "part", resume=True, **options | {"scale_rate": 0.02})
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", lambda *args, **kw: calls.append(1) or step(*args, **kw))
        calls.clear()
        part = train(llama, text, tmp_path / "part", resume=True, **options)
    assert len(calls) == 2 * 4  # steps five to eight, of two micro-batches
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert report_of(part)["trained"]["held_out"] == report_of(whole)["trained"]["held_out"]
    assert not (part / UNFINISHED).exists()
    again = (part / "model.safetensors").stat().st_mtime_ns
    train(llama, text, tmp_path / "part", resume=True, **options)
    assert (part / "model.safetensors").stat().st_mtime_ns == again


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
    monkeypatch.setattr("llmq.qat.request.multiplies_bfloat16", lambda _: False)
    out = train(packed, text, tmp_path / "out", activations=8, **options)
    before = report_of(out)["trained"]["held_out"][0]
    rounded, plain = (loss_of(packed, text, each) for each in (True, False))
    assert abs(before - rounded) < 0.1 * abs(rounded - plain)
    assert {scheme.rounded_inputs for scheme in Checkpoint(out).schemes.values()} == {True}
    again = train(out, text, tmp_path / "again", steps=1, **options)  # a start that rounds goes on rounding
    assert report_of(again)["trained"]["held_out"][0] == pytest.approx(loss_of(out, text, True), rel=1e-5)
    assert {scheme.rounded_inputs for scheme in Checkpoint(again).schemes.values()} == {True}


def test_adapters_are_trained_kept_and_merged_into_a_packed_checkpoint(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", lora=4, lora_rate=0.02, calibration_samples=20, steps=16)
    said = report_of(out)["trained"]
    before, after = said["held_out"]
    assert after < before
    assert said["merged"] < before
    scheme = Checkpoint(out).schemes
    assert scheme == Checkpoint(packed).schemes
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        adapted = llmq.get_peft_model(llmq.load(packed, "cpu"), out / "adapter")(ids).logits
        plain, merged = (llmq.load(each, "cpu")(ids).logits for each in (packed, out))
    assert float((merged - adapted).norm()) < float((plain - adapted).norm())
    train(packed, text, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "adapter").exists()


def test_adapters_that_help_nothing_leave_the_start_as_it_is(packed, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.qat.road.train_student", lambda *_: Outcome({}, 1.0, 1.0, 2, []))
    out = train(packed, text, tmp_path / "out", lora=4)
    assert moved(packed, out) == set()
    assert report_of(out)["trained"]["merged"] is None
    assert not (out / "adapter").exists()


def test_a_process_that_is_killed_after_its_training_does_not_train_again(packed, text, tmp_path, monkeypatch):
    whole = train(packed, text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.road._write", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "part")
    assert not (tmp_path / "part" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.road.train_student", stopped)
        part = train(packed, text, tmp_path / "part", resume=True)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_training_that_ended_is_not_gone_on_with(packed, text, tmp_path, monkeypatch):
    """Over several epochs. transformers' Trainer itself would do one step more after the last one."""
    options = {"steps": 24, "learn": "codes"}
    whole = train(packed, text, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.outcome.Outcome.save", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "part", **options)
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "training_step", stopped)
        part = train(packed, text, tmp_path / "part", resume=True, **options)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert report_of(part)["trained"] == report_of(whole)["trained"]


def test_embeddings_that_files_hold_twice_stay_equal(text, tmp_path):
    source = save_tiny(tmp_path / "source", "qwen2")
    packed = run(source, text, tmp_path / "packed", bits=4)
    rewrite(packed, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    (packed / REPORT).unlink()
    out = train(packed, text, tmp_path / "out", learn="all", outside_rate=0.01)
    old, new = (load_file(path / "model.safetensors") for path in (packed, out))
    assert torch.equal(new["lm_head.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(new["lm_head.weight"], old["lm_head.weight"])


def test_the_original_of_another_model_is_refused(packed, deep_llama, text, tmp_path):
    other = save_tiny(tmp_path / "other", "llama-gqa", vocab_size=256)
    with pytest.raises(RequestError, match="another model"):
        train(packed, text, tmp_path / "out", loss="kl", original=str(other))
    wider = save_tiny(tmp_path / "wider", "llama-gqa", intermediate_size=128)
    with pytest.raises(RequestError, match=r"down_proj of the original is \(64, 128\)"):
        train(packed, text, tmp_path / "out", loss="kl", original=str(wider))


def test_the_work_of_another_program_is_not_resumed(llama, packed, text, tmp_path):
    work = tmp_path / "out" / UNFINISHED / "work"
    work.mkdir(parents=True)
    (work / "part-00000.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="another program"):
        train(packed, text, tmp_path / "out", resume=True)


def test_batches_are_whole_and_every_sequence_comes_before_one_comes_again():
    order = shuffled(9, 40, 3)
    assert len(order) == 40
    for start in range(0, 36, 9):
        assert sorted(order[start : start + 9]) == list(range(9))
    assert order == shuffled(9, 40, 3) != shuffled(9, 40, 4)


def test_two_processes_train_together_on_twice_the_sequences(packed, text, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "llmq.train"]
    flags = ["--model", packed, "--output", tmp_path / "out", "--data", text, "--steps", "4", "--batch", "4"]
    flags += ["--sequence-length", "32", "--samples", "40", "--scale-rate", "0.01", "--checks", "2", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, flags)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = report_of(tmp_path / "out")["trained"]
    assert said["tokens_seen"] == 4 * 4 * 32 * 2
    assert said["held_out"][1] < said["held_out"][0]
    check(tmp_path / "out", report_of(tmp_path / "out")["digests"])


def test_a_process_that_is_killed_while_it_publishes_is_continued(packed, text, tmp_path, monkeypatch):
    whole = train(packed, text, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("llmq.checkpoint.writer.os.replace", stopped_at_config(os.replace))
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "part")
    part = train(packed, text, tmp_path / "part", resume=True)
    assert (part / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert report_of(part)["trained"]["held_out"] == report_of(whole)["trained"]["held_out"]


def test_patience_ends_a_training_that_gets_no_better(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", scale_rate=50.0, patience=1, steps=40, checks=40)
    assert report_of(out)["trained"]["steps"] < 10


def test_checkpointing_runs_blocks_again_and_gives_the_same_result(packed, text, tmp_path, monkeypatch):
    plain, runs, forward = train(packed, text, tmp_path / "plain"), [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda *x: runs.append(torch.is_grad_enabled()) or forward(*x))
    train(packed, text, tmp_path / "again")
    usual = len(runs)
    kept = train(packed, text, tmp_path / "kept", checkpointing=True)
    assert len(runs) - usual == usual + 8 * 2 * 2  # two micro-batches of eight steps through two blocks
    losses = [report_of(each)["trained"]["held_out"][1] for each in (plain, kept)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "bits must be one of"),
        ({"bits": 3, "format": "awq"}, "awq"),
        ({"original": "other"}, "an original model is its own"),
        ({"lora": 4}, "needs a packed checkpoint"),
        ({"calibration_samples": 9999}, "Lower --calibration-samples"),
        ({"activations": 8, "format": "gptq"}, "cannot say that inputs are rounded"),
    ],
)
def test_a_wrong_request_for_an_original_model_is_refused_and_leaves_nothing(options, words, llama, text, tmp_path):
    with pytest.raises(RequestError, match=words):
        train(llama, text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "kl"}, "--original"),
        ({"bits": 3}, "bits has no effect"),
        ({"calibration": "pydoc"}, "calibration has no effect"),
        ({"rate": 0.1}, "rate has no effect"),
        ({"lora_rate": 0.1}, "lora rate has no effect"),
        ({"scale_rate": 0.0}, "nothing would learn"),
        ({"lora": 4, "calibration_samples": 9999}, "Lower --calibration-samples"),
        ({"train_layers": ","}, "names no layer"),
        ({"sequence_length": 4096}, "context of 256 tokens"),
        ({"train_layers": "nothing"}, "no packed layer"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_leaves_nothing(options, words, packed, text, tmp_path):
    with pytest.raises(RequestError, match=words):
        train(packed, text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_it_takes_and_writes_nothing(packed, llama, text, tmp_path, capsys):
    for model in (packed, llama):
        train(model, text, tmp_path / "out", dry_run=True, learn="codes")
        told = capsys.readouterr().out
        assert "codes, scales, norms and biases" in told
        assert "memory    about" in told
        assert "time      about" in told
    assert not (tmp_path / "out").exists()
