"""One GGUF file, its tensors dequantized one at a time as they are read."""

import mmap
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llmq.core.errors import CheckpointError


class GgufFile:
    """One .gguf file, each tensor dequantized when read. `skeleton`: the model on the meta device.

    The map of its parameter names to GGUF's and the row orders come from transformers, which cannot read lazily.
    """

    def __init__(self, path: Path, skeleton: nn.Module) -> None:
        from gguf import GGUFReader  # the `demo` extra
        from transformers import modeling_gguf_pytorch_utils as hf_gguf

        config: Any = skeleton.config
        reader = GGUFReader(path)
        architecture = hf_gguf.read_field(reader, "general.architecture")[0]
        processor = hf_gguf.TENSOR_PROCESSORS.get(architecture, hf_gguf.TensorProcessor)
        self.paths, self._mapped = [path], cast(Any, reader.data)._mmap
        self._processor = processor(config=config.to_dict())
        # Asked for a whole model, transformers maps the names of every submodule anew: seconds for nothing on most.
        names = hf_gguf.get_gguf_hf_weights_map(cast(Any, _Leaf(skeleton)), self._processor)
        if len(names) < len(skeleton.state_dict()):
            names = hf_gguf.get_gguf_hf_weights_map(cast(Any, skeleton), self._processor)
        self._gguf_name = {hf: gguf for gguf, hf in names.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def names(self) -> set[str]:
        return {hf for hf, gguf in self._gguf_name.items() if gguf in self._tensors}

    def dtype(self, name: str) -> torch.dtype:  # noqa: ARG002 all alike
        return torch.float16

    def nbytes(self, name: str) -> int:
        return self._tensors[self._gguf_name[name]].n_elements * self.dtype(name).itemsize

    def read(self, name: str) -> Tensor:
        from gguf import dequantize

        stored = self._tensors.get(self._gguf_name.get(name, ""))
        if stored is None:
            raise CheckpointError(f"{self.paths[0]}: no tensor is named {name}")
        weights = dequantize(stored.data, stored.tensor_type)
        # The pages just read would count as this program's memory for as long as the file is mapped.
        self._mapped.madvise(mmap.MADV_DONTNEED)
        # float16: the block scales of a GGUF file are float16 themselves, so float32 would only double the copy.
        return torch.tensor(self._processor.process(weights, stored.name).weights, dtype=torch.float16)


class _Leaf:
    """A model that owns up to its parameters, but not to its submodules."""

    def __init__(self, model: nn.Module) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[tuple[str, nn.Module]]:
        return []
