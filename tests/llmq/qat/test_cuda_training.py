"""llmq.train on a GPU: it learns as a CPU does."""

import importlib.util

import pytest
import torch
from packed import logits, some_tokens
from trainings import report_of, train

import llmq

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options", [{}, {"learn": "codes"}, {"learn": "all"}, {"activations": 8}, {"checkpointing": True}]
)
def test_training_brings_the_loss_as_far_down_as_on_a_cpu(options, packed, text, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        out = train(packed, text, tmp_path / device, device=device, steps=24, **options)
        losses.append(report_of(out)["trained"]["held_out"])
    (before, on_cpu), (start, on_gpu) = losses
    assert start == pytest.approx(before, rel=1e-2)
    assert before - on_gpu == pytest.approx(before - on_cpu, rel=0.2)
    assert logits(llmq.load(out, "cuda"), some_tokens().to("cuda")).isfinite().all()


def test_the_original_is_followed_on_the_same_gpu(llama, packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", device="cuda", loss="kl", original=str(llama), learn="codes")
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before


def test_an_interrupted_training_on_a_gpu_goes_on_to_a_sound_checkpoint(packed, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("llmq.qat.outcome.Outcome.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(packed, text, tmp_path / "out", device="cuda")
    out = train(packed, text, tmp_path / "out", device="cuda", resume=True)
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_adapters_learn_on_packed_weights_on_a_gpu(packed, text, tmp_path):
    out = train(packed, text, tmp_path / "out", device="cuda", lora=4, lora_rate=0.02, steps=16, calibration_samples=20)
    before, after = report_of(out)["trained"]["held_out"]
    assert after < before
    adapted = llmq.get_peft_model(llmq.load(packed, "cuda"), out / "adapter")
    with torch.no_grad():
        assert adapted(some_tokens().to("cuda")).logits.isfinite().all()
