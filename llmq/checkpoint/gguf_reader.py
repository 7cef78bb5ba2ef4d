"""Opens a .gguf file as a packed checkpoint: its blocks of codes stay as they are, other tensors become floats.

    blk.0.attn_q.weight  Q4_0  ──►  model.layers.0.self_attn.q_proj.blocks   rows in the order of the model
    token_embd.weight    F16   ──►  model.embed_tokens.weight

Names, row orders and the configuration come from transformers, so do the architectures that can be read.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq.checkpoint.model_files import Companions, companions_of
from llmq.core.errors import CheckpointError
from llmq.formats import gguf as blocks
from llmq.models.gguf_file import GgufFile
from llmq.models.gguf_header import GgufHeader, read_header
from llmq.models.model_source import ModelSource
from llmq.models.packable import can_pack

_KINDS = {kind.number: name for name, kind in blocks.TYPES.items()}
_BY = "general.quantized_by"
SCALES = "llmq.scale_dtype"
"""The key under which a file of llmq holds the dtype that scales have in other formats, if it is not float16."""
_SCALES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def holds_blocks(path: Path) -> bool:
    """Return whether linears of a .gguf file are in blocks that llmq keeps packed."""
    header = read_header(path)
    kinds = _kept_kinds(header)
    return any(
        name.startswith("blk.")
        and name.endswith(".weight")
        and len(tensor.shape) > 1
        and _KINDS.get(tensor.kind) in kinds
        for name, tensor in header.tensors.items()
    )


def _kept_kinds(header: GgufHeader) -> set[str]:
    """Return the types of blocks that are kept. Q4_1 of other tools has no whole zero points, but any least weight."""
    is_ours = str(header.metadata.get(_BY, "")).startswith("llmq ")
    return {name for name in blocks.TYPES if name != "Q4_1" or is_ours}


class GgufCheckpointFiles:
    """The tensors of a .gguf file, under the names of the model. Linears of decoder blocks are packed.

    Raises RequestError or CheckpointError for what `ModelSource` cannot open.
    """

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.source = ModelSource(str(path))
        file = self.source.files.stored
        assert isinstance(file, GgufFile)
        self._file, self.paths = file, file.paths
        scale = str(header.metadata.get(SCALES, "float16"))
        if scale not in _SCALES:
            raise CheckpointError(f"{path}: {SCALES} is {scale[:40]!r}, which is no dtype of scales")
        self.scale_dtype = _SCALES[scale]
        """The dtype that the scales had in llmq; the file has them in float16."""
        kinds, names = _kept_kinds(header), file.names()
        self.types: dict[str, str] = {}
        """The type of the blocks of each packed linear."""
        for block in self.source.block_names:
            for inner, module in self.source.skeleton.get_submodule(block).named_modules():
                name = f"{block}.{inner}"
                if isinstance(module, nn.Linear) and f"{name}.weight" in names:
                    kind = file.kind(f"{name}.weight")
                    packs = kind in kinds and can_pack(module, blocks.TYPES[kind].bits)
                    if packs and file.row_order(f"{name}.weight") is not None:
                        self.types[name] = kind
        self._names = {self._packed_name(name) for name in names}
        self._read_shapes: dict[str, tuple[int, ...]] = {}

    @property
    def companions(self) -> Companions:
        """Return what would lie beside the weights in a directory."""
        companions, dtype = companions_of(self.source), str(self._file.usual_dtype).removeprefix("torch.")
        return replace(companions, config=companions.config | {"dtype": dtype, "torch_dtype": dtype})

    @property
    def quantization(self) -> dict[str, Any]:
        """Return what stands for the quantization_config of other formats."""
        return {"quant_method": blocks.METHOD, "types": self.types}

    def _packed_name(self, name: str) -> str:
        linear = name.removesuffix(".weight")
        return f"{linear}.blocks" if linear in self.types and name.endswith(".weight") else name

    def _linear(self, name: str) -> str | None:
        linear = name.removesuffix(".blocks")
        return linear if linear in self.types and name.endswith(".blocks") else None

    def names(self) -> set[str]:
        return self._names

    def read(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype; of a packed linear, its blocks. Raises CheckpointError."""
        linear = self._linear(name)
        return self._file.read(name) if linear is None else self._file.row_blocks(f"{linear}.weight")

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.read(name) for name in names}

    def dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if self._linear(name) else self._file.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape. The tensor is read, once: the model may have another one than the file."""
        if name not in self._read_shapes:
            self._read_shapes[name] = tuple(self.read(name).shape)
        return self._read_shapes[name]

    def is_float(self, name: str) -> bool:
        return self._linear(name) is None

    def nbytes(self, name: str) -> int:
        linear = self._linear(name)
        return self._file.stored_nbytes(f"{linear}.weight") if linear else self._file.nbytes(name)
