import pytest
import torch
from trainings import report_of, train
from transformers.models.llama.modeling_llama import LlamaMLP

from llmq.qat.trainer import shuffled


def test_batches_are_whole_and_every_sequence_comes_before_one_comes_again():
    order = shuffled(9, 40, 3)
    assert len(order) == 40
    for start in range(0, 36, 9):
        assert sorted(order[start : start + 9]) == list(range(9))
    assert order == shuffled(9, 40, 3) != shuffled(9, 40, 4)


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
