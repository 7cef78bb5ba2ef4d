"""Weights of one block taken through the whole format, before hours go into a file that nobody can read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmq.algorithms.problem import Problem, round_to_nearest
from llmq.core.errors import CheckpointError, WorkError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats.scheme import Scheme
from llmq.models.block_structure import packable_widths
from llmq.run.block_quantizer import Run

_ROWS = 1024  # proved at once


def prove(run: Run) -> None:
    """Take weights of the first block through the whole format: linears of each shape and number of bits.

    Raises WorkError if other codes, scales or zero points come back than went in, or weights that are not finite.
    """
    block, seen = run.chosen[0], set[tuple[torch.Size, int]]()
    for inner, module in run.source.skeleton.get_submodule(block).named_modules():
        name = f"{block}.{inner}"
        if not isinstance(module, nn.Linear) or not packable_widths([module]):
            continue
        if (module.weight.shape, run.bits[name]) not in seen:
            seen.add((module.weight.shape, run.bits[name]))
            for rows in run.source.read(f"{name}.weight").split(_ROWS):
                _prove(run, name, nearest(run, rows, run.bits[name]))


def _prove(run: Run, name: str, weight: QuantizedWeight) -> None:
    """Raise WorkError unless a weight survives the format."""
    wrong = f"{name} does not survive being written in format {run.config.stored_as}"
    try:
        found = there_and_back(run, name, weight)
    except CheckpointError as error:
        raise WorkError(f"{wrong}: {error}") from None
    for part, what in (("q", "codes"), ("scale", "scales"), ("zero", "zero points")):
        before, after = getattr(weight, part).cpu(), getattr(found, part)
        if before.dtype != after.dtype or not torch.equal(before, after):
            raise WorkError(f"{wrong}: other {what} come back; please report it, and choose another --format")
    if not bool(torch.isfinite(found.dequantize()).all()):
        raise WorkError(f"{wrong}: its weights are not finite; choose another --group-size or --format")


def nearest(run: Run, W: Tensor, bits: int) -> QuantizedWeight:
    """Rounded to nearest on the grid of the run."""
    grid = replace(run.grid, bits=bits).on(W.shape[1])
    clippable = torch.ones(len(W), dtype=torch.bool, device=run.device)
    found = round_to_nearest(Problem(W.to(run.device, torch.float32), None, grid, run.scale_dtype, clippable))
    return QuantizedWeight(found.q, found.scale, found.zero, bits)


def there_and_back(run: Run, name: str, weight: QuantizedWeight) -> QuantizedWeight:
    """What a reader of the checkpoint makes of a weight."""
    scheme = Scheme(weight.bits, run.grid.group_size, run.grid.symmetric)
    tensors = {part: tensor.cpu() for part, tensor in run.format.encode(name, weight, scheme).items()}
    config = run.format.hf_config({name: scheme}, [])
    return run.format.decode(name, tensors, run.format.schemes_of(config, [name])[name])
