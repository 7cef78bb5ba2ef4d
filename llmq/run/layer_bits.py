"""Other bits for some layers: which linears `--layer-bits NAME=BITS` names."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError
from llmq.models.block_structure import SIBLINGS
from llmq.models.model_source import ModelSource


def bits_of_linears(config: QuantizeConfig, source: ModelSource) -> dict[str, int]:
    """The bits of every linear of the blocks, by its name in the model.

    Raises RequestError for patterns that fit no linear, and for linears that engines fuse and that would differ.
    """
    wanted = config.other_bits
    bits: dict[str, int] = {}
    used: set[str] = set()
    for block in source.block_names:
        for name, module in source.skeleton.get_submodule(block).named_modules():
            if isinstance(module, torch.nn.Linear):
                full = f"{block}.{name}"
                pattern = next((p for p in wanted if fnmatchcase(full, p) or fnmatchcase(full, f"*.{p}")), None)
                bits[full] = config.bits if pattern is None else wanted[pattern]
                used |= {pattern} if pattern else set()
    if idle := [pattern for pattern in wanted if pattern not in used]:
        raise RequestError(f"layer bits: no linear of this model is called {idle[0]!r} (first: {next(iter(bits))})")
    _check_fused(bits)
    return bits


def _check_fused(bits: dict[str, int]) -> None:
    for name in bits:
        parent, _, leaf = name.rpartition(".")
        for fused in SIBLINGS:
            if leaf in fused and len({bits.get(f"{parent}.{each}", bits[name]) for each in fused}) > 1:
                raise RequestError(
                    f"layer bits: {', '.join(fused)} of {parent} run as one in engines: same bits for all"
                )
