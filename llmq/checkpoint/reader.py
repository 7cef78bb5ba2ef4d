"""Read a quantized checkpoint of any tool: which linears are packed, in which scheme, and all other tensors."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmq.checkpoint.mlx_files import MlxFiles
from llmq.core.errors import CheckpointError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import Format, format_of, gguf, mlx, schemes_of
from llmq.models.locate import gguf_in
from llmq.models.model_files import ModelFiles
from llmq.models.safetensors_files import CheckpointFiles, SafetensorsDirectory
from llmq.models.untrusted_files import read_json, refuse_odd_files

if TYPE_CHECKING:
    from llmq.checkpoint.gguf_reader import GgufCheckpointFiles

CONFIG = "config.json"
CPU = torch.device("cpu")
# Files for the settings of older tools, which did not write them into config.json; and the method of each tool.
LEGACY = ("quantize_config.json", "quant_config.json")
_LEGACY_METHODS = ("gptq", "awq")


class Checkpoint:
    """A quantized checkpoint. Its tensors stay on disk; `weight` reads and decodes one linear at a time.

    It lies in a directory, or is a .gguf file. Names are those in the files. `for_model` gives the same checkpoint with
    the names that a model uses.

    Raises CheckpointError if the directory holds none, or one that llmq cannot read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.gguf = _opened_gguf(directory)
        if self.gguf is None:
            refuse_odd_files(directory)
            self.config = read_json(directory, CONFIG)
            self.quantization = _quantization(directory, self.config)
        else:
            self.config, self.quantization = self.gguf.companions.config, self.gguf.quantization
        self.format: Format = format_of(self.quantization) if self.gguf is None else gguf
        self.files: CheckpointFiles | ModelFiles = self._open_files()
        suffix = f".{self.format.TENSOR_SUFFIXES[0]}"
        self.linears = sorted(name.removesuffix(suffix) for name in self.files.names() if name.endswith(suffix))
        if not self.linears:
            raise CheckpointError(f"{directory} holds no layer packed as {self.format.METHOD}, although it says so")
        of_linears = schemes_of if self.gguf is None else gguf.schemes_of
        self.schemes = of_linears(self.quantization, self.linears)

    def _open_files(self) -> CheckpointFiles:
        if self.gguf is not None:
            return self.gguf
        if self.format.METHOD == mlx.METHOD:
            return MlxFiles(self.directory, self.quantization)
        return SafetensorsDirectory(self.directory)

    def for_model(self, model: Any) -> Checkpoint:
        """Return this checkpoint with the names that its tensors and linears have in a model."""
        view = copy(self)
        packed = self.linears, self.format.TENSOR_SUFFIXES
        view.files = files = ModelFiles(self.files, model, packed, renamed=self.gguf is None)
        view.linears = sorted(files.linears)
        view.schemes = {name: self.schemes[files.linears[name]] for name in view.linears}
        for cached in ("packed_names", "other_names"):
            view.__dict__.pop(cached, None)
        return view

    def weight(
        self, name: str, instead: Mapping[str, Tensor] | None = None, device: torch.device = CPU
    ) -> QuantizedWeight:
        """Return one linear, decoded on the device. Raises CheckpointError if its tensors are not sound.

        `instead`: tensors to decode where they are, instead of those on disk.
        """
        names = {f"{name}.{suffix}" for suffix in self.format.TENSOR_SUFFIXES}
        tensors = {n: instead[n] for n in names if instead is not None and n in instead}
        on_disk = self.files.read_all((names & self.files.names()) - tensors.keys())
        tensors |= {n: tensor.to(device) for n, tensor in on_disk.items()}
        weight = self.format.decode(name, tensors, self.schemes[name])
        return weight if self.gguf is None else replace(weight, scale=weight.scale.to(self.gguf.scale_dtype))

    @property
    def model_files(self) -> ModelFiles:
        """The files of a checkpoint that has the names of a model."""
        assert isinstance(self.files, ModelFiles)
        return self.files

    def stored_linear(self, name: str) -> str:
        """Return the name that a packed linear has in the files."""
        return self.files.linears[name] if isinstance(self.files, ModelFiles) else name

    def read(self, name: str) -> Tensor:
        """Return a tensor that is no part of a packed linear. Raises CheckpointError if it cannot be read."""
        return self.files.read(name)

    @cached_property
    def packed_names(self) -> set[str]:
        """The names of the tensors of packed linears."""
        suffixes = self.format.TENSOR_SUFFIXES
        return {f"{name}.{suffix}" for name in self.linears for suffix in suffixes} & self.files.names()

    @cached_property
    def other_names(self) -> list[str]:
        """The names of all other tensors, sorted."""
        return sorted(self.files.names() - self.packed_names)


def is_packed(path: Path) -> bool:
    """Return whether a path holds a quantized checkpoint: of any method, or a .gguf file whose blocks stay packed."""
    try:
        if (file := gguf_in(path)) is not None:
            from llmq.checkpoint.gguf_reader import holds_blocks

            return holds_blocks(file)
        config = read_json(path, CONFIG)
        return bool(config.get("quantization_config") or config.get(mlx.SETTINGS)) or any(
            (path / name).exists() for name in LEGACY
        )
    except CheckpointError:  # not a packed checkpoint; ModelSource explains what is wrong with it
        return False


def _opened_gguf(path: Path) -> GgufCheckpointFiles | None:
    """Return the .gguf file that a path means, None if it means a directory of other files."""
    if (file := gguf_in(path)) is None:
        return None
    from llmq.checkpoint.gguf_reader import GgufCheckpointFiles  # it needs transformers, and `llmq.inspect` does not

    return GgufCheckpointFiles(file)


def _quantization(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the quantization, from config.json or the file of an older tool."""
    settings = config.get("quantization_config")
    # mlx_lm writes its settings into both entries, and reads this one.
    if isinstance(config.get(mlx.SETTINGS), dict) and not (isinstance(settings, dict) and "quant_method" in settings):
        return config[mlx.SETTINGS]
    if isinstance(settings, dict):
        return settings
    if settings is None:
        for name, method in zip(LEGACY, _LEGACY_METHODS, strict=True):
            if (directory / name).exists():
                return {"quant_method": method} | read_json(directory, name)
    raise CheckpointError(f"{directory} is not a quantized checkpoint: its {CONFIG} has no quantization_config")
