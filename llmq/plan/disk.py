"""Bytes on disk: of the checkpoint, of what waits until it is put together, of hidden states."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmq.checkpoint.output_dir import existing_parent
from llmq.checkpoint.writer import SHARD_BYTES
from llmq.core.distributed import processes_here
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats.scheme import Scheme
from llmq.plan.block_shapes import Layout
from llmq.plan.workload import States
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request


@dataclass(frozen=True)
class Disk:
    """Bytes to be written to one file system."""

    path: Path
    what: str
    needed: int
    free: int


def packed_shapes(found: Iterable[Layout]) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every linear that is to be packed, by its name in the model."""
    return {
        f"{block}.{name}": layout.shapes[name]
        for layout in found
        for block in layout.blocks
        for group in layout.groups
        for name in group.linears
    }


def output_bytes(run: Run, shapes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Of the tensors to be written: the packed ones, and those that stay as they are."""
    state, known = run.source.skeleton.state_dict(), dict[tuple[tuple[int, int], int], int]()
    for name, shape in shapes.items():
        if (shape, run.bits[name]) not in known:
            known[shape, run.bits[name]] = packed_bytes(run, shape, run.bits[name])
    plain = [name for name in run.source.tensor_names if name.removesuffix(".weight") not in shapes]
    return (
        sum(known[shape, run.bits[name]] for name, shape in shapes.items()),
        sum(state[name].numel() * run.source.files.dtype(name).itemsize for name in plain),
    )


def packed_bytes(run: Run, shape: tuple[int, int], bits: int) -> int:
    """Of the tensors of a linear in the format of the run: those it would write, without their data."""
    scheme = Scheme(bits, run.grid.group_size, run.grid.symmetric)
    q = torch.empty(shape, dtype=torch.uint8, device="meta")
    scale = torch.empty(shape[0], scheme.groups(shape[1]), dtype=run.scale_dtype, device="meta")
    weight = QuantizedWeight(q, scale, torch.empty(scale.shape, dtype=torch.uint8, device="meta"), bits)
    return sum(tensor.nbytes for tensor in run.format.encode("linear", weight, scheme).values())


def disks(request: Request, states: States, output: int) -> list[Disk]:
    """What is to be written where, without what is there already or will make room."""
    config, local = request.config, processes_here(request.ranks)
    twice = 2 if config.end_to_end else 1  # what was made block by block stays until the training is done
    needed = [(config.output, "the checkpoint", twice * output + min(output, SHARD_BYTES) - _there(request))]
    if states.directory is not None:
        there = sum(path.stat().st_size for path in states.directory.glob("*.states"))
        needed.append((states.directory, "hidden states", local * max(0, 2 * states.nbytes - there)))
    found: dict[int, Disk] = {}
    for path, what, size in needed:
        parent = existing_parent(path)
        disk = found.get(parent.stat().st_dev, Disk(path, "", 0, shutil.disk_usage(parent).free))
        what = " and ".join(filter(None, (disk.what, what)))
        found[parent.stat().st_dev] = Disk(disk.path, what, disk.needed + max(0, size), disk.free)
    return list(found.values())


def _there(request: Request) -> int:
    """Bytes of an earlier run in the output directory that this one goes on with, or replaces."""
    output, config = request.config.output, request.config
    if not (config.overwrite or config.resume) or not output.is_dir():
        return 0
    replaced = [*output.glob("model*.safetensors")] if config.overwrite else []
    files = [*replaced, *output.glob("*.partial/**/*.safetensors")]
    return sum(path.stat().st_size for path in files)
