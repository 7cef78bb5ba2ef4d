"""A directory of MLX's files. What mlx_lm packs beside the linears of blocks is read as dense tensors.

    model.embed_tokens.{weight, scales, biases}  ──►  model.embed_tokens.weight  [rows, width] in float32

mlx_lm 0.32.2 packs everything whose rows are a multiple of the group size. Embeddings and routers are often no linears
in transformers, so there is no module that would keep them packed. They are in float32, because scale * q + bias mostly
has more digits than the dtype of the scales.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.core.errors import CheckpointError
from llmq.formats import mlx
from llmq.formats.scheme import Scheme, part_of
from llmq.models.safetensors_files import SafetensorsDirectory

_EMBEDDINGS = ("embed_tokens", "embed_tokens_per_layer", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
_EMBEDDINGS += ("embedding", "wte", "wpe")
_ROUTERS = ("gate", "shared_expert_gate", "router", "router.layer", "router.proj", "router.gate", "router.classifier")
_DENSE = re.compile(rf"(?:.+\.)?(?:{'|'.join(map(re.escape, _EMBEDDINGS + _ROUTERS))})")
"""What is read dense; routers only if they have fewer rows than columns, as in models/routers.py."""
_ROWS = 4096  # unpacked at a time: a table of embeddings has up to 262,144


class MlxFiles(SafetensorsDirectory):
    """The tensors of an MLX checkpoint with these settings. Raises CheckpointError like `SafetensorsDirectory`."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(directory)
        packed = {name.removesuffix(".scales") for name in super().names() if name.endswith(".scales")}

        def parts_of(name: str) -> tuple[str, str] | None:
            # `experts.NAME.weight` in float is no stack of MLX: JetMoE calls other weights so.
            is_stack = ".switch_mlp." in name or name.rpartition(".")[0] in packed
            return mlx.in_stack(name) if is_stack else None

        self.split(parts_of)
        found = mlx.schemes_of(settings, sorted(name for name in packed if _DENSE.fullmatch(name)))
        self.dense = {name: scheme for name, scheme in found.items() if not self._is_large_gate(name, scheme)}
        """The scheme of each packed weight that is read as a dense one."""
        self._names = super().names() - {f"{name}.{part}" for name in self.dense for part in ("scales", "biases")}

    def _is_large_gate(self, name: str, scheme: Scheme) -> bool:
        rows, *groups = super().shape(f"{name}.scales") or (0,)
        return name.endswith(_ROUTERS) and len(groups) == 1 and rows >= groups[0] * scheme.group_size

    def names(self) -> set[str]:
        return self._names  # asked for with every linear, and a large mixture has 50,000 names

    def _packed(self, name: str) -> str | None:
        """Return what is packed in place of this tensor; None if it is stored as it is read."""
        module, _, leaf = name.rpartition(".")
        return module if leaf == "weight" and module in self.dense else None

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {name: self._packed(name) for name in names}
        read = super().read_all(name for name, packed in wanted.items() if packed is None)
        return read | {name: self._unpacked(packed) for name, packed in wanted.items() if packed is not None}

    def _unpacked(self, name: str) -> Tensor:
        """Return the weights of a packed table."""
        stored = super().read_all(self._parts(name))
        scales = part_of(name, stored, "scales")
        if any(tensor.shape[:1] != scales.shape[:1] for tensor in stored.values()) or not scales.ndim:
            raise CheckpointError(f"{name}: its packed tensors have different numbers of rows")
        W = torch.empty(0)
        for first in range(0, max(1, len(scales)), _ROWS):
            rows = {part: tensor[first : first + _ROWS] for part, tensor in stored.items()}
            piece = mlx.decode(name, rows, self.dense[name]).dequantize(torch.float64)
            W = W if len(W) else torch.empty(len(scales), piece.shape[1])
            W[first : first + _ROWS] = piece
        return W

    def _parts(self, name: str) -> set[str]:
        return {f"{name}.{part}" for part in mlx.TENSOR_SUFFIXES} & self._shard_of.keys()

    def dtype(self, name: str) -> torch.dtype:
        return super().dtype(name) if self._packed(name) is None else torch.float32

    def shape(self, name: str) -> tuple[int, ...]:
        packed, stored = self._packed(name), super().shape(name)
        if packed is None or not stored:
            return stored
        return (*stored[:-1], 32 * stored[-1] // self.dense[packed].bits)

    def is_float(self, name: str) -> bool:
        return self._packed(name) is not None or super().is_float(name)

    def nbytes(self, name: str) -> int:
        packed = self._packed(name)
        return sum(super(MlxFiles, self).nbytes(part) for part in ([name] if packed is None else self._parts(packed)))
