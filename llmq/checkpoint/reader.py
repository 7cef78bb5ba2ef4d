"""A quantized checkpoint on disk, whoever wrote it: which linears are packed and how, and what else it holds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import format_of, schemes_of
from llmq.models.safetensors_files import SafetensorsDirectory
from llmq.models.untrusted_files import read_json, refuse_odd_files

CONFIG = "config.json"
# Where tools kept the settings before config.json had a place for them, and what that tool was.
LEGACY = ("quantize_config.json", "quant_config.json")
_LEGACY_METHODS = ("gptq", "awq")


class Checkpoint:
    """A quantized checkpoint, its tensors read one linear at a time.

    Raises CheckpointError if the directory is not one, or holds a quantization llmq does not read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        refuse_odd_files(directory)
        self.config = read_json(directory, CONFIG)
        self.quantization = _quantization(directory, self.config)
        self.format = format_of(self.quantization)
        self.files = SafetensorsDirectory(directory)
        suffix = f".{self.format.TENSOR_SUFFIXES[0]}"
        self.linears = sorted(name.removesuffix(suffix) for name in self.files.names() if name.endswith(suffix))
        if not self.linears:
            raise CheckpointError(f"{directory} holds no layer packed as {self.format.METHOD}, although it says so")
        self.schemes = schemes_of(self.quantization, self.linears)

    def weight(self, name: str, instead: Mapping[str, Tensor] | None = None) -> QuantizedWeight:
        """One decoded linear. Raises CheckpointError if its tensors are not sound.

        Args:
            instead: tensors to take in place of those on disk.
        """
        parts = {f"{name}.{part}" for part in self.format.TENSOR_SUFFIXES} & self.files.names()
        tensors = instead if instead is not None and parts <= instead.keys() else {p: self.files.read(p) for p in parts}
        return self.format.decode(name, tensors, self.schemes[name])

    def read(self, name: str) -> Tensor:
        """One other tensor, as stored. Raises CheckpointError if it cannot be read."""
        return self.files.read(name)

    @cached_property
    def packed_names(self) -> set[str]:
        """The tensors of packed linears."""
        return {f"{name}.{part}" for name in self.linears for part in self.format.TENSOR_SUFFIXES} & self.files.names()

    @cached_property
    def other_names(self) -> list[str]:
        """All other tensors."""
        return sorted(self.files.names() - self.packed_names)


def is_packed(path: Path) -> bool:
    """Whether the directory is a quantized checkpoint, of whatever method."""
    try:
        config = read_json(path, CONFIG)
        return bool(config.get("quantization_config")) or any((path / name).exists() for name in LEGACY)
    except CheckpointError:  # not a packed checkpoint; what it is, ModelSource will say
        return False


def _quantization(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    found = config.get("quantization_config")
    if isinstance(found, dict):
        return found
    if found is None:
        for name, method in zip(LEGACY, _LEGACY_METHODS, strict=True):
            if (directory / name).exists():
                return {"quant_method": method} | read_json(directory, name)
    raise CheckpointError(f"{directory} is not a quantized checkpoint: its {CONFIG} has no quantization_config")
