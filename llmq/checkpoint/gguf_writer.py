"""Writes a packed checkpoint as one GGUF file, and reads it back.

The converter of llama.cpp says what the file holds (models/gguf_converter.py), models/gguf_layout.py where the rows of
packed linears go in it. Codes and scales are those of the checkpoint. One tensor is in memory at a time.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llmq.checkpoint.gguf_reader import SCALES
from llmq.checkpoint.reader import Checkpoint
from llmq.core.config import VERSION
from llmq.core.errors import CheckpointError
from llmq.formats import gguf as blocks
from llmq.formats.scheme import Scheme
from llmq.models.gguf_converter import (
    Added,
    Converted,
    Leaf,
    as_request_errors,
    check_converter,
    open_converter,
    refuse_code,
)
from llmq.models.gguf_header import read_header
from llmq.models.gguf_layout import Laid, Source, lay_out


@dataclass(frozen=True)
class GgufSettings:
    """How a file is written."""

    name: str
    """The name of the model, for people and for the file."""
    floats: str = "auto"
    """How tensors that are not packed are stored; one of `gguf_converter.FLOATS`."""
    trust_remote_code: bool = False
    progress: bool = False


@dataclass(frozen=True)
class Written:
    """What was written: the file, and the linears that are in it as float numbers."""

    path: Path
    in_float: list[str]


class GgufWriter:
    """Writes a checkpoint, with the names of its files, into one GGUF file.

    Args:
        schemes: of each packed linear, by its name in the files.
        sources: the tensors that Hugging Face's files would hold instead.

    Raises RequestError if llmq or llama.cpp's converter cannot write this model as GGUF.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        schemes: Mapping[str, Scheme],
        sources: Mapping[str, Source],
        settings: GgufSettings,
    ) -> None:
        self._checkpoint, self._schemes, self._sources, self._settings = checkpoint, schemes, sources, settings
        check_converter(checkpoint.config)
        if not settings.trust_remote_code:
            refuse_code(checkpoint.directory)
        self._kinds: dict[str, str] = blocks.hf_config(schemes, [])["types"]
        files = checkpoint.files
        floats = {
            name: Leaf(tuple(files.shape(name)), files.dtype(name), partial(files.read, name))
            for name in checkpoint.other_names
            if files.is_float(name)
        }
        self._model = Converted(checkpoint.directory, settings.name, floats, settings.floats)
        kinds = {name: (kind, blocks.TYPES[kind].weights) for name, kind in self._kinds.items()}
        with as_request_errors(checkpoint.directory):
            self._laid, self._in_float = lay_out(self._model, sources, kinds)
        self._digests, self._sizes = dict[str, str](), dict[str, int]()

    @property
    def file_name(self) -> str:
        """Return the name of the file: the model, and the type of most blocks."""
        return f"{self._model.name}-{self._usual_kind}.gguf"

    @property
    def _usual_kind(self) -> str:
        return Counter(self._kinds.values()).most_common(1)[0][0]

    def write(self, directory: Path) -> Written:
        """Write the file and read it back. Raises CheckpointError if it is not what was written."""
        import gguf

        path = directory / self.file_name
        with as_request_errors(self._checkpoint.directory):
            made = open_converter(self._model, self._leaves(), self._add, path)
            made.prepare_tensors()
            made.ftype = gguf.LlamaFileType[f"MOSTLY_{self._usual_kind}"]
            made.prepare_metadata(vocab_only=False)
            writer = made.gguf_writer
            writer.add_quantized_by(f"llmq {VERSION}")
            scale = self._checkpoint.weight(self._checkpoint.linears[0]).scale.dtype
            if scale != torch.float16:
                writer.add_string(SCALES, str(scale).removeprefix("torch."))
            writer.write_header_to_file(path=path)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file(progress=self._settings.progress)
            writer.close()
        self._check(path)
        return Written(path, sorted(self._in_float))

    def _leaves(self) -> dict[str, Leaf]:
        """Return what the converter is given for packed linears. It only looks at the shapes of most."""

        def weight(linear: str) -> Tensor:
            return self._checkpoint.weight(linear).dequantize()

        return {n: Leaf(each.shape, torch.float32, partial(each.filled, weight)) for n, each in self._sources.items()}

    def _add(self, add: Callable[..., None], added: Added) -> None:
        """Add a tensor to the file: blocks where the converter would put the weights of packed linears."""
        import gguf

        if (laid := self._laid.get(added.name)) is not None:
            kind = blocks.TYPES[self._kinds[laid.linears[0]]]
            shape = (*added.data.shape[:-1], added.data.shape[-1] // kind.weights * kind.nbytes)
            meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(np.uint8, shape)
            data = gguf.LazyNumpyTensor(meta=meta, args=(0,), func=lambda _: laid.placed(self._blocks).reshape(shape))
            self._sizes[added.name] = math.prod(shape)
            add(added.name, data, raw_dtype=gguf.GGMLQuantizationType(kind.number))
            return

        def remembered(data: np.ndarray) -> np.ndarray:
            self._digests[added.name] = _digest(data)
            return data

        self._sizes[added.name] = added.data.nbytes
        data = gguf.LazyNumpyTensor(meta=added.data._meta, args=(added.data,), func=remembered)
        add(added.name, data, raw_dtype=added.dtype)

    def _blocks(self, name: str) -> np.ndarray:
        """Return the blocks of a linear. [out, blocks, bytes]"""
        stored = blocks.encode(name, self._checkpoint.weight(name), self._schemes[name])[f"{name}.blocks"]
        return stored.unflatten(1, (-1, blocks.TYPES[self._kinds[name]].nbytes)).numpy()

    def _check(self, path: Path) -> None:
        """Raise CheckpointError unless the file holds the codes, scales and zero points of every packed linear."""
        stored, content = read_header(path).tensors, np.memmap(path, mode="r")
        if stored.keys() != self._laid.keys() | self._sizes.keys():
            raise CheckpointError(f"{path} does not hold the tensors that were written; write it again")
        for name, tensor in stored.items():
            data = content[tensor.start : tensor.start + self._sizes[name]]
            if (laid := self._laid.get(name)) is None:
                same = self._digests[name] == _digest(data)
            else:
                same = all(self._same(laid, data, linear) for linear in laid.linears)
            if not same:
                raise CheckpointError(f"{path}: {name} is not what was written; write it again")

    def _same(self, laid: Laid, stored: np.ndarray, name: str) -> bool:
        """Tell whether a tensor of the file holds these rows of a linear."""
        kind = self._kinds[name]
        rows, taken = laid.taken(name, stored.reshape(len(laid.row), len(laid.blocks), -1))
        scheme = blocks.schemes_of({"types": {name: kind}}, [name])[name]
        found = blocks.decode(name, {f"{name}.blocks": torch.from_numpy(taken).flatten(1)}, scheme)
        whole, those = self._checkpoint.weight(name), torch.from_numpy(rows)
        wanted = replace(whole, q=whole.q[those], scale=whole.scale[those], zero=whole.zero[those])
        return blocks.is_same(found, wanted)


def _digest(data: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()
