"""What tells whether a tensor on disk is the one that was computed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.core.quantized_weight import QuantizedWeight


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


class Noted(Checkpoint):
    """A checkpoint that notes the digest of each packed linear and other tensor when it is first read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.digests: dict[str, str] = {}

    def weight(self, name: str, instead: Mapping[str, Tensor] | None = None) -> QuantizedWeight:
        value = super().weight(name, instead)
        self._note(name, value)
        return value

    def read(self, name: str) -> Tensor:
        value = super().read(name)
        self._note(name, value)
        return value

    def _note(self, name: str, value: Tensor | QuantizedWeight) -> None:
        if name not in self.digests:  # tied embeddings are read twice
            self.digests[name] = digest(value)
