import torch
from trainings import moved, report_of, train

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.qat.outcome import Outcome


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
