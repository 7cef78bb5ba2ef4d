"""What tells whether a tensor on disk is the one that was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from llmq.checkpoint import Checkpoint
from llmq.weight import QuantizedWeight


def digest(value: Tensor | QuantizedWeight) -> str:
    """SHA-256 of a tensor (dtype, shape, bytes), or of the codes and grids of a weight, whatever format it is in."""
    hashed = hashlib.sha256()
    parts = [value] if isinstance(value, Tensor) else [value.q, value.scale, value.zero, value.group_of]
    for part in parts:
        if part is not None:
            hashed.update(f"{part.dtype} {list(part.shape)} ".encode())
            plain = part.detach().cpu().contiguous().flatten()
            hashed.update(plain.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digests_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """The digest of every packed linear and other tensor: of those on disk, or of `tensors` in their place."""
    tensors = tensors or {}
    found: dict[str, str] = {}
    for name in checkpoint.linears:
        found[name] = digest(checkpoint.weight(name, tensors))
    for name in checkpoint.other_names:
        found[name] = digest(tensors[name] if name in tensors else checkpoint.files.read(name))
    return found
