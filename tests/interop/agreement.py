"""Check that a model opened by another project computes with the same weights that llmq reads from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.reader import Checkpoint
from llmq.formats.scheme import Scheme


@torch.no_grad()
def assert_same_weights(model: Any, directory: Path) -> set[Scheme]:
    """Assert that every packed linear has the weights that llmq decodes, to the last bit. Returns all schemes found.

    The weights are read off the outputs, so the biases are removed from the model.
    """
    checkpoint = Checkpoint(directory)
    assert len(checkpoint.linears) == 2 * 7
    for name in checkpoint.linears:
        linear, weight = model.get_submodule(name), checkpoint.weight(name).dequantize(torch.float16)
        linear.bias = None
        # Each output is one weight times one, plus zeros.
        assert torch.equal(linear(torch.eye(weight.shape[1], dtype=torch.float16)).T, weight), name
    return set(checkpoint.schemes.values())
