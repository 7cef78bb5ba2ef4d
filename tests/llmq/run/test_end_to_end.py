import json
from dataclasses import replace

import pytest
import torch
from packed import rewrite
from safetensors.torch import load_file
from small_runs import run
from tiny import save_tiny

from llmq.calibration.block_runner import Compute
from llmq.calibration.texts import hold_out, windows
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.core.memory import free_memory
from llmq.core.settings import Calibration, Tuned
from llmq.models.model_source import ModelSource
from llmq.run.end_to_end import distill
from llmq.run.student import Learning, Student
from llmq.runtime.evaluation import evaluate, logits_of
from llmq.runtime.load import load

CPU = Compute(torch.device("cpu"))
SETTINGS = Tuned(steps=0, end_steps=50, end_samples=0, end_batch=4, end_rate=0.003, end_scale_rate=0.001)


@pytest.fixture(scope="module")
def packed(deep_llama, text_file, tmp_path_factory):
    return run(deep_llama, text_file, tmp_path_factory.mktemp("packed") / "out", bits=2)


def tokens_of(model, text_file):
    return hold_out(windows(ModelSource(str(model)).tokenizer, Calibration(str(text_file), 60, 32)))


def original_of(model):
    return ModelSource(str(model)).load_all(torch.device("cpu"), torch.float32)


def student_of(packed, original, compute, settings):
    return Student(packed, original, compute, learning=Learning(codes=settings.end_rate > 0))


@torch.no_grad()
def test_a_student_starts_as_the_checkpoint_it_was_made_of(packed, deep_llama):
    student, ids = Student(packed, original_of(deep_llama), CPU), torch.arange(3, 35)[None]
    stored = load_file(packed / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in student.tensors().items())
    assert {name for name in stored if "norm" in name} < set(student.tensors())
    torch.testing.assert_close(student.model(ids).logits, load(packed, device="cpu")(ids).logits)


@torch.no_grad()
def test_what_would_be_stored_is_a_copy_that_later_steps_do_not_change(packed, deep_llama):
    student = Student(packed, original_of(deep_llama), CPU)
    before = student.tensors()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    for vector in student.vectors.values():
        vector.add_(1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())


@pytest.mark.parametrize("rate", [0.0, 0.005])
def test_training_brings_the_predictions_closer_and_moves_codes_if_asked(rate, packed, deep_llama, text_file):
    original, tokens = original_of(deep_llama), tokens_of(deep_llama, text_file)
    settings = replace(SETTINGS, end_rate=rate)
    changed, (before, after) = distill(student_of(packed, original, CPU, settings), original, tokens, settings)
    assert after < 0.95 * before
    stored = load_file(packed / "model.safetensors")
    moved = {name.rpartition(".")[2] for name, tensor in changed.items() if not torch.equal(tensor, stored[name])}
    assert moved == {"weight_scale", "weight"} | ({"weight_packed"} if rate else set())


def test_training_that_makes_it_worse_changes_nothing(packed, deep_llama, text_file):
    original, tokens = original_of(deep_llama), tokens_of(deep_llama, text_file)
    settings = replace(SETTINGS, end_scale_rate=30.0)
    changed, (before, after) = distill(student_of(packed, original, CPU, settings), original, tokens, settings)
    assert changed == {}
    assert after == before


@torch.no_grad()
def divergence(model, original, tokens, precision):
    """Mean KL(original || model) over all positions of the held-out text."""
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        given, wanted = (each(tokens.held_out).logits.float().log_softmax(-1) for each in (model, original))
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def dense(checkpoint, source):
    """The model of the checkpoint with dequantized weights."""
    model, checkpoint = original_of(source), Checkpoint(checkpoint)
    stored = checkpoint.files.names() & model.state_dict().keys()
    state = {name: checkpoint.files.read(name).float() for name in stored}
    state |= {f"{name}.weight": checkpoint.weight(name).dequantize() for name in checkpoint.linears}
    assert set(model.load_state_dict(state, strict=False).missing_keys) == {"lm_head.weight"}  # tied
    return model


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_claimed_is_true_of_what_is_stored(precision, tmp_path, text_file):
    """bfloat16 rounds scales, norms and biases coarsely: the claim must be about the rounded ones."""
    source = save_tiny(tmp_path / "source", "qwen2", torch.bfloat16)
    packed = run(source, text_file, tmp_path / "packed", bits=2)
    original, tokens = original_of(source), tokens_of(source, text_file)
    compute = Compute(torch.device("cpu"), precision=precision)
    settings = replace(SETTINGS, end_steps=20)
    changed, (before, after) = distill(student_of(packed, original, compute, settings), original, tokens, settings)
    assert after < before
    assert {name.rpartition(".")[2] for name in changed} >= {"bias", "weight", "weight_scale"}
    rewrite(packed, lambda tensors: tensors.update(changed))
    tolerance = 1e-4 if precision == torch.float32 else 1e-2
    assert divergence(dense(packed, source), original, tokens, precision) == pytest.approx(after, rel=tolerance)


@torch.no_grad()
def test_a_run_ends_with_it_and_the_report_says_what_it_brought(tmp_path, deep_llama, text_file):
    def result(name, settings):
        return run(deep_llama, text_file, tmp_path / name, method="tuned", bits=2, samples=60, tuned=settings)

    plain, trained = result("plain", Tuned(steps=0, end_steps=0)), result("trained", SETTINGS)
    before, after = json.loads((trained / REPORT).read_text())["distilled"]
    assert after < before
    assert json.loads((plain / REPORT).read_text())["distilled"] is None
    held_out, reference = tokens_of(deep_llama, text_file).held_out, logits_of(original_of(deep_llama))
    kl = [evaluate(load(each, device="cpu"), held_out, reference).kl for each in (plain, trained)]
    assert kl[1] < kl[0]
    assert {path.name for path in trained.iterdir()} == {path.name for path in plain.iterdir()}


@pytest.mark.parametrize("text", ["self", "file", "more"])
def test_it_trains_on_more_than_the_calibration_text_and_is_judged_by_that(
    text, tmp_path, deep_llama, text_file, monkeypatch
):
    seen = []

    def spy(student, original, tokens, *_):
        seen.append(tokens)
        return {}, (1.0, 1.0)

    monkeypatch.setattr("llmq.run.end_to_end.distill", spy)
    settings = replace(SETTINGS, end_text=str(text_file) if text == "file" else text, end_samples=7)
    run(deep_llama, text_file, tmp_path / "out", method="tuned", samples=20, tuned=settings)
    more = seen[0].train[18:]
    assert more.shape == (7, 32)
    tokenizer, calibration = ModelSource(str(deep_llama)).tokenizer, Calibration(str(text_file), 20, 32)
    if text == "more":  # one draw: no window shares a place with another
        drawn = windows(tokenizer, calibration, 7)
        every = torch.cat([seen[0].train, seen[0].held_out])
        assert sorted(every.tolist()) == sorted(drawn.tolist())
        assert torch.equal(more, drawn[sorted(drawn.tolist().index(window) for window in more.tolist())])
    else:
        alone = hold_out(windows(tokenizer, calibration))
        assert torch.equal(seen[0].held_out, alone.held_out)
        assert torch.equal(seen[0].train[:18], alone.train)
        assert not (more[:, None] == seen[0].train[:18]).all(-1).any()


def test_a_text_to_train_on_that_is_not_there_is_refused_before_the_work(tmp_path, deep_llama, text_file):
    settings = replace(SETTINGS, end_text="nowhere.txt", end_samples=7)
    with pytest.raises(RequestError, match="nowhere"):
        run(deep_llama, text_file, tmp_path / "out", method="tuned", tuned=settings)
    assert not (tmp_path / "out").exists()


def test_what_is_free_is_more_than_nothing_and_less_than_everything():
    free = free_memory(torch.device("cpu"))
    assert free is None or 1e6 < free < 1e14


def test_only_tuned_trains_the_whole_model(tmp_path):
    ends = [QuantizeConfig("demo", tmp_path, method=method).end_to_end for method in ("gptq", "tuned")]
    assert ends == [False, True]
