"""Hidden states on disk and in pinned memory are read as they were written, even after a process was killed."""

from contextlib import contextmanager

import pytest
import torch
from fake_gpu import GPU, FakeGpu

from llmq.calibration import hidden_states
from llmq.calibration.hidden_states import HiddenDir, PinnedStates, StoredRows, StoredStates, new_hidden_dir
from llmq.core.errors import WorkError


def states(dtype=torch.float32, count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2 - (i == count - 1), 5, 7, generator=generator).to(dtype) for i in range(count)]


def stored(directory, tensors, turn=None):
    return StoredStates(
        HiddenDir(directory, "run", turn), "quantized", [each.shape for each in tensors], tensors[0].dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_even_before_all_is(dtype, tmp_path):
    first, second = states(dtype), [each + 1 for each in states(dtype)]
    kept = stored(tmp_path, first)
    for i, each in enumerate(first):
        kept[i] = each
    assert all(map(torch.equal, kept, first))
    kept[1] = second[1]
    assert torch.equal(kept[0], first[0])
    assert torch.equal(kept[1], second[1])
    assert len(kept) == 3


def test_a_new_process_finds_the_states_before_those_that_were_being_written(tmp_path):
    first, second = states(), [each + 1 for each in states()]
    kept = stored(tmp_path, first)
    for i, each in enumerate(first):
        kept[i] = each
    turn = kept.complete
    kept[0] = second[0]
    assert kept.complete is None
    again = stored(tmp_path, first, turn)
    assert all(map(torch.equal, again, first))
    for i, each in enumerate(second):
        again[i] = each
    assert again.complete == 1 - turn
    assert all(map(torch.equal, again, second))


def test_a_file_that_is_too_short_is_an_error_not_numbers(tmp_path):
    kept = stored(tmp_path, states())
    for i, each in enumerate(states()):
        kept[i] = each
    path = kept.hidden_dir.files("quantized")[kept.complete]
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(kept[0], states()[0])
    with pytest.raises(WorkError, match=r"shorter.*--offload-dir"):
        kept[2]


def test_a_new_directory_is_made_and_emptied_of_states(tmp_path):
    kept = stored(new_hidden_dir(tmp_path / "states", "run").directory, states())
    kept[0] = states()[0]
    kept.close()
    kept.close()
    (tmp_path / "states" / "notes.md").write_text("mine")
    assert new_hidden_dir(tmp_path / "states", "other").turn is None
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["notes.md"]
    with pytest.raises(WorkError, match="--offload-dir"):
        new_hidden_dir(tmp_path / "states" / "notes.md", "run")


def test_states_of_another_shape_are_a_mistake(tmp_path):
    kept = stored(tmp_path, states())
    with pytest.raises(AssertionError):
        kept[0] = states()[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_as_those_of_a_tensor_are(dtype, tmp_path):
    matrix = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = StoredRows(HiddenDir(tmp_path, "run"), "experts-0", matrix)
    for rows in ([], [3], [8, 0, 0, 5]):
        found = kept[torch.tensor(rows, dtype=torch.long)]
        assert found.dtype == dtype
        assert torch.equal(found, matrix[rows])
    StoredRows(HiddenDir(tmp_path, "run"), "experts-0", matrix[:5])
    with pytest.raises(WorkError, match="shorter than it was written"):
        kept[torch.tensor([8])]


class Streams:
    """CUDA's streams, on a CPU. Every copy waits in its stream until another stream waits for it."""

    def __init__(self, monkeypatch):
        self.work, self.side, self.said = self.Stream(self), None, []
        self.current = self.work
        monkeypatch.setattr(torch.cuda, "Stream", self.new)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        monkeypatch.setattr(hidden_states, "_pinned", torch.empty)

    class Stream:
        def __init__(self, owner):
            self.owner = owner

        def wait_stream(self, other):
            self.owner.said.append("side waits for work")

        def wait_event(self, event):
            self.owner.said.append(f"work waits for {event}")

        def record_event(self):
            self.owner.said.append("a copy begins")
            return "that copy"

    def new(self, device):
        self.side = self.Stream(self)
        return self.side

    @contextmanager
    def inside(self, stream):
        self.current = stream
        yield
        self.current = self.work


def test_pinned_states_come_one_ahead_and_the_newest_is_read(monkeypatch):
    streams, shapes = Streams(monkeypatch), [torch.Size([2, 3])] * 3
    with FakeGpu():
        states = PinnedStates(shapes, torch.float32, GPU)
        assert len(states) == 3
        for i in range(3):
            states[i] = torch.full((2, 3), float(i), device=GPU)
        assert streams.said == ["side waits for work"] * 3
        streams.said.clear()
        assert [float(states[i][0, 0]) for i in range(3)] == [0, 1, 2]
    begins, waits = "a copy begins", "work waits for that copy"
    # The first one is fetched when it is wanted, then each comes before it is wanted.
    assert streams.said == [begins, waits, begins, waits, begins, waits]
    with FakeGpu():
        states[0]  # the next one is on its way, and then it changes
        states[1] = torch.full((2, 3), 9.0, device=GPU)
        assert float(states[1][0, 0]) == 9


def test_memory_for_pinned_states_is_pinned(monkeypatch):
    asked, made = {}, torch.zeros(2, 3)
    monkeypatch.setattr(torch, "empty", lambda shape, **kwargs: asked.update(kwargs) or made)
    assert hidden_states._pinned(made.shape, dtype=torch.float16) is made
    assert asked == {"dtype": torch.float16, "pin_memory": True}
