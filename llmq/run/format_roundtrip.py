"""Writes and reads a few weights in the chosen format before the run: no hours go into a file that nobody can read."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from llmq.algorithms.problem import Problem, round_to_nearest
from llmq.core.errors import CheckpointError, WorkError
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import Format, gguf
from llmq.formats.scheme import Scheme
from llmq.models.packable import can_pack
from llmq.run.block_quantizer import Run

_ROWS = 1024  # taken through the format at once


def prove(run: Run) -> None:
    """Take one linear of each shape and number of bits in the first chosen block through the format, there and back.

    Raises WorkError if the codes, scales or zero points that come back differ, or the weights are not finite.
    """
    block, proved = run.chosen[0], set[tuple[torch.Size, int]]()
    for inner, module in run.source.skeleton.get_submodule(block).named_modules():
        name = f"{block}.{inner}"
        if not isinstance(module, nn.Linear) or not can_pack(module, run.bits[name]):
            continue
        if (module.weight.shape, run.bits[name]) not in proved:
            proved.add((module.weight.shape, run.bits[name]))
            weight = run.source.read(f"{name}.weight")
            if weight.shape != module.weight.shape:
                found, wanted = tuple(weight.shape), tuple(module.weight.shape)
                raise CheckpointError(f"{name}.weight is {found}; the model that config.json describes wants {wanted}")
            for rows in weight.split(_ROWS):
                _prove(run, name, nearest(run, rows, run.bits[name]))


def _prove(run: Run, name: str, weight: QuantizedWeight) -> None:
    """Raise WorkError unless the format gives a weight back as it was."""
    wrong = f"{name} does not survive being written in format {run.config.stored_as}"
    try:
        back = there_and_back(run, run.format, name, weight)
        blocks = there_and_back(run, gguf, name, weight) if run.config.stored_as == gguf.METHOD else None
    except CheckpointError as error:
        raise WorkError(f"{wrong}: {error}") from None
    for field, what in (("q", "codes"), ("scale", "scales"), ("zero", "zero points")):
        before, after = getattr(weight, field).cpu(), getattr(back, field)
        if before.dtype != after.dtype or not torch.equal(before, after):
            raise WorkError(f"{wrong}: other {what} come back; please report this, and choose another --format")
    if blocks is not None and not gguf.is_same(blocks, back):
        raise WorkError(f"{wrong}: other codes or scales come back; please report this, and choose another --format")
    if not bool(torch.isfinite(back.dequantize()).all()):
        raise WorkError(f"{wrong}: its weights are not finite; choose another --group-size or --format")


def nearest(run: Run, W: Tensor, bits: int) -> QuantizedWeight:
    """Return weights rounded to the nearest point of the run's grid."""
    grid = replace(run.grid, bits=bits).on(W.shape[1])
    clippable = torch.ones(len(W), dtype=torch.bool, device=run.device)
    solution = round_to_nearest(Problem(W.to(run.device, torch.float32), None, grid, run.scale_dtype, clippable))
    return QuantizedWeight(solution.q, solution.scale, solution.zero, bits).with_codes_as_zeros()


def there_and_back(run: Run, form: Format, name: str, weight: QuantizedWeight) -> QuantizedWeight:
    """Return a weight as a reader of this format will see it."""
    scheme = Scheme(weight.bits, run.grid.group_size, run.grid.symmetric)
    tensors = {key: tensor.cpu() for key, tensor in form.encode(name, weight, scheme).items()}
    config = form.hf_config({name: scheme}, [])
    return form.decode(name, tensors, form.schemes_of(config, [name])[name])
