"""Hidden states on disk are read as they were written, even after a process was killed."""

import pytest
import torch

from llmq.calibration.hidden_states import HiddenDir, StoredRows, StoredStates, new_hidden_dir
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
