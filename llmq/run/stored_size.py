"""Counts the bytes of a checkpoint before it is made."""

from collections.abc import Callable, Container
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from llmq.checkpoint.model_files import companions_of
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats.scheme import Scheme
from llmq.models.model_source import ModelSource
from llmq.run.block_quantizer import Run

_ENTRY = 120  # bytes that a header says of a tensor, and config.json of a layer, besides its name


def packed_bytes(run: Run, shape: tuple[int, int], bits: int) -> int:
    """Return the bytes of a packed linear. Its format encodes tensors without data (meta device) to find out."""
    scheme = Scheme(bits, run.grid.group_size, run.grid.symmetric)
    q = torch.empty(shape, dtype=torch.uint8, device="meta")
    scale = torch.empty(shape[0], scheme.groups(shape[1]), dtype=run.scale_dtype, device="meta")
    weight = QuantizedWeight(q, scale, torch.empty(scale.shape, dtype=torch.uint8, device="meta"), bits)
    return sum(tensor.nbytes for tensor in run.format.encode("linear", weight, scheme).values())


def packed_sizes(run: Run) -> Callable[[tuple[int, int], int], int]:
    """Return `packed_bytes` of this run as a function of shape and bits that counts each pair once."""
    return cache(partial(packed_bytes, run))


def plain_bytes(run: Run, packed: Container[str]) -> int:
    """Return the bytes of all tensors but the weights of the packed linears. `packed`: their names in the model."""
    state, files = run.source.skeleton.state_dict(), run.source.files
    plain = [name for name in run.source.tensor_names if name.removesuffix(".weight") not in packed]
    carried = sum(map(files.nbytes, run.source.carried_names))
    return sum(state[name].numel() * files.dtype(name).itemsize for name in plain) + carried


def files_beside(source: ModelSource) -> int:
    """Return the bytes of all but tensors: tokenizer, config.json, headers. It is a bit too many."""
    modules = source.skeleton.named_modules()
    entries = sum(_ENTRY + len(name) for name in source.tensor_names)
    entries += sum(3 * (_ENTRY + len(name)) for name, module in modules if isinstance(module, nn.Linear))
    with TemporaryDirectory() as name:
        companions_of(source).write(directory := Path(name))
        return entries + sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
