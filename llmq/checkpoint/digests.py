"""Digests of tensors: they show whether a tensor on disk is the one that was computed."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.checkpoint.reader import CPU, Checkpoint
from llmq.core.quantized_weight import QuantizedWeight
from llmq.models.safetensors_files import CheckpointFiles


def digest(value: Tensor | QuantizedWeight) -> str:
    """Return the SHA-256 of a tensor (dtype, shape, bytes) or a weight (codes and grids, the same in every format)."""
    hashed = hashlib.sha256()
    parts = ("q", "scale", "zero", "group_of", "input_scale")
    if isinstance(value, QuantizedWeight):
        value = value.with_codes_as_zeros()
    tensors = [value] if isinstance(value, Tensor) else [getattr(value, part) for part in parts]
    for tensor in tensors:
        if tensor is not None:
            hashed.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            hashed.update(flat.view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def digests_of(checkpoint: Checkpoint, tensors: Mapping[str, Tensor] | None = None) -> dict[str, str]:
    """Return the digest of every packed linear and every other tensor, by name.

    `tensors`: taken instead of those on disk, by name.
    """
    tensors = tensors or {}
    linears = {name: digest(checkpoint.weight(name, tensors)) for name in checkpoint.linears}
    read = checkpoint.files.read
    return linears | {n: digest(tensors[n] if n in tensors else read(n)) for n in checkpoint.other_names}


class DigestingCheckpoint(Checkpoint):
    """A checkpoint that computes the digest of each packed linear and other tensor when it is first read.

    `digests` holds them by their names in the files. So a check that reads every tensor once also has every digest.
    """

    def __init__(self, directory: Path) -> None:
        self.digests: dict[str, str] = {}
        super().__init__(directory)

    def _open_files(self) -> CheckpointFiles:
        files: Any = _DigestingFiles(super()._open_files(), self.digests)
        return files

    def weight(
        self, name: str, instead: Mapping[str, Tensor] | None = None, device: torch.device = CPU
    ) -> QuantizedWeight:
        weight, stored = super().weight(name, instead, device), self.stored_linear(name)
        if stored not in self.digests:
            self.digests[stored] = digest(weight)
        return weight


class _DigestingFiles:
    """Files that compute the digest of each tensor when it is first read alone."""

    def __init__(self, files: CheckpointFiles, digests: dict[str, str]) -> None:
        self._files, self._digests = files, digests

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read(self, name: str) -> Tensor:
        tensor = self._files.read(name)
        if name not in self._digests:  # tied embeddings are read twice
            self._digests[name] = digest(tensor)
        return tensor
