"""Stacked tensors are read one part at a time, under names of their own."""

import pytest
import torch
from safetensors.torch import save_file

from llmq.core.errors import CheckpointError
from llmq.models.safetensors_files import SafetensorsDirectory


def opened(directory, **tensors):
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return SafetensorsDirectory(directory)


def parts_of(name):
    return (f"{name}.", "") if name.startswith("stack") else None


def test_each_part_has_its_own_name_shape_and_bytes(tmp_path):
    stack = torch.arange(24, dtype=torch.float16).view(4, 2, 3)
    files = opened(tmp_path, stack=stack, other=torch.ones(2))
    files.split(parts_of)
    assert files.names() == {"other", *(f"stack.{i}" for i in range(4))}
    for i in range(4):
        assert (files.shape(f"stack.{i}"), files.nbytes(f"stack.{i}")) == ((2, 3), 12)
        assert files.dtype(f"stack.{i}") == torch.float16
        assert torch.equal(files.read(f"stack.{i}"), stack[i])
    assert torch.equal(files.read("other"), torch.ones(2))


@pytest.mark.parametrize("shape", [(5000, 0, 3), (4097, 1), (7,), ()], ids=str)
def test_what_is_no_stack_is_refused(tmp_path, shape):
    with pytest.raises(CheckpointError, match=r"stack is .*, and no stack of at most 4096"):
        opened(tmp_path, stack=torch.zeros(shape)).split(parts_of)


def test_a_part_that_is_stored_alone_as_well_is_refused(tmp_path):
    files = opened(tmp_path, **{"stack": torch.zeros(2, 3), "stack.1": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"stack\.1 is stored twice, once in stack"):
        files.split(lambda name: ("stack.", "") if name == "stack" else None)
