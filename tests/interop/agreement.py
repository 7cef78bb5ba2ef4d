"""Whether a model that other people's code has opened computes with the weights that llmq reads from the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.reader import Checkpoint
from llmq.formats.scheme import Scheme


@torch.no_grad()
def assert_same_weights(model: Any, directory: Path) -> set[Scheme]:
    """Fail unless every packed linear, given one input at a time, puts out what llmq decodes, to the last bit.

    Returns the kinds of weights there are. Biases are taken off the model.
    """
    checkpoint = Checkpoint(directory)
    assert len(checkpoint.linears) == 3 * 7
    for name in checkpoint.linears:
        linear, weight = model.get_submodule(name), checkpoint.weight(name).dequantize(torch.float16)
        linear.bias = None
        # Each output is one weight times one, and zeros.
        assert torch.equal(linear(torch.eye(weight.shape[1], dtype=torch.float16)).T, weight), name
    return set(checkpoint.schemes.values())
