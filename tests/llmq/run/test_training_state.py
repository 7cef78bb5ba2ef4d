import pytest
import torch

import llmq
from llmq.core.config import QuantizeConfig
from llmq.core.settings import Tuned
from llmq.run import training_state
from llmq.run.training_state import TrainingState


@pytest.fixture
def at_every_step(monkeypatch):
    monkeypatch.setattr(training_state, "_SECONDS", 0.0)
    monkeypatch.setattr(training_state, "_SHARE", 1e9)


def test_it_reads_what_it_wrote(tmp_path):
    state, tensors = TrainingState(tmp_path / "state"), {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5)}
    assert state.load() == {}
    state.save(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in state.load().items())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_what_cannot_be_read_counts_as_none(tmp_path):
    (tmp_path / "state").write_bytes(b"cut")
    (tmp_path / "directory").mkdir()
    assert TrainingState(tmp_path / "state").load() == TrainingState(tmp_path / "directory").load() == {}


def test_a_full_disk_does_not_end_a_training(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_state, "save_file", full)
    state = TrainingState(tmp_path / "state")
    state.save({})
    assert "cannot be kept ([Errno 28] No space left on device); it goes on" in capsys.readouterr().err
    assert not state.is_due


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training_state.time, "monotonic", lambda: clock[0])

    def slow(*_):
        clock[0] += 5
        (tmp_path / "state.new").touch()

    monkeypatch.setattr(training_state, "save_file", slow)
    state, due = TrainingState(tmp_path / "state"), []
    for clock[0] in (59.0, 60.0):
        due.append(state.is_due)
    state.save({})
    for clock[0] in (300.0, 320.0):
        due.append(state.is_due)
    assert due == [False, True, False, True]


@pytest.mark.parametrize("rate", [0.0, 0.002])
@pytest.mark.usefixtures("at_every_step")
def test_a_run_goes_on_in_the_middle_of_its_training(rate, deep_llama, text_file, tmp_path, monkeypatch):
    tuned = Tuned(end_steps=20, end_samples=0, end_batch=4, end_rate=rate, end_scale_rate=0.001)
    settings = {"method": "tuned", "bits": 2, "calibration": str(text_file), "tuned": tuned}
    sizes = {"samples": 60, "sequence_length": 32, "group_size": 32}

    def run(name, **more):
        llmq.quantize(QuantizeConfig(str(deep_llama), tmp_path / name, **settings, **sizes, **more))
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole, save, saved = run("whole"), TrainingState.save, []
    has_best = []

    def spy(self, tensors):
        save(self, tensors)
        saved.append(int(tensors["step"]))
        has_best.append(any(name.startswith("best.") for name in tensors))
        if saved == list(range(1, 16)):
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingState, "save", spy)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    assert run("broken", resume=True) == whole
    assert saved == list(range(1, 21))
    assert has_best[14]
    assert not list((tmp_path / "broken").glob("*.partial"))
