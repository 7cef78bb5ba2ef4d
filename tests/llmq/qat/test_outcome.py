import torch

from llmq.qat.outcome import Outcome


def test_an_outcome_is_read_back_as_it_was_written(tmp_path):
    outcome = Outcome({"a.weight": torch.arange(6.0).view(2, 3)}, 1.5, 0.1 + 0.2, 7, [{"step": 2, "loss": 1.25}])
    assert Outcome.load(tmp_path) is None
    outcome.save(tmp_path)
    again = Outcome.load(tmp_path)
    assert torch.equal(again.changed["a.weight"], outcome.changed["a.weight"])
    rest = ("before", "after", "steps", "history")
    assert [getattr(again, name) for name in rest] == [getattr(outcome, name) for name in rest]


def test_tensors_without_the_rest_are_those_of_a_process_that_was_killed(tmp_path):
    Outcome({"a": torch.ones(1)}, 1.0, 1.0, 1, []).save(tmp_path)
    (tmp_path / "trained.json").unlink()
    assert Outcome.load(tmp_path) is None


def test_an_outcome_without_a_change_is_kept_too(tmp_path):
    Outcome({}, 1.0, 1.0, 3, []).save(tmp_path)
    assert Outcome.load(tmp_path).changed == {}
