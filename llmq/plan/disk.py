"""Counts the bytes a run writes to disk: the checkpoint, its unfinished files, and hidden states."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmq.calibration.hidden_states import States
from llmq.checkpoint.output_dir import existing_parent
from llmq.checkpoint.writer import SHARD_BYTES
from llmq.core.distributed import processes_here
from llmq.plan.block_shapes import Layout
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request
from llmq.run.stored_size import packed_sizes, plain_bytes


@dataclass(frozen=True)
class Disk:
    """Bytes that the run will write to one file system."""

    path: Path
    what: str
    needed: int
    free: int


def packed_shapes(layouts: Iterable[Layout]) -> dict[str, tuple[int, int]]:
    """Return (rows, columns) of every linear that will be packed, by its name in the model."""
    return {
        f"{block}.{name}": layout.shapes[name]
        for layout in layouts
        for block in layout.blocks
        for group in layout.groups
        for name in group.linears
    }


def output_bytes(run: Run, shapes: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the bytes of the checkpoint's tensors as (packed ones, those that stay as they are)."""
    size_of = packed_sizes(run)
    return sum(size_of(shape, run.bits[name]) for name, shape in shapes.items()), plain_bytes(run, shapes)


def disks(request: Request, states: States, output: int) -> list[Disk]:
    """Return what the run writes to each file system, less the bytes that are there already or make room.

    The checkpoint is written in parts. Joining them to shards needs room for one more shard. Training from end to end
    needs the checkpoint twice: the one made block by block stays until the trained one is finished. So does GGUF.
    Training also keeps its state: the best weights so far, and V and two moments of Adam of each weight if codes learn.
    """
    config, local = request.config, processes_here(request.ranks)
    copies = 3 if config.end_to_end else 2 if config.stored_as == "gguf" else 1
    size = copies * output + 12 * request.source.size * (config.end_to_end and config.tuned.end_rate > 0)
    needed = [(config.output, "the checkpoint", size + min(output, SHARD_BYTES) - _existing_bytes(request))]
    if states.directory is not None:
        existing = sum(path.stat().st_size for path in states.directory.glob("*.states"))
        # Twice: a block's outputs are written while its inputs are still there.
        size = 2 * states.nbytes + states.experts
        needed.append((states.directory, "hidden states", local * max(0, size - existing)))
    by_device: dict[int, Disk] = {}
    for path, what, size in needed:
        parent = existing_parent(path)
        disk = by_device.get(parent.stat().st_dev, Disk(path, "", 0, shutil.disk_usage(parent).free))
        what = " and ".join(filter(None, (disk.what, what)))
        by_device[parent.stat().st_dev] = Disk(disk.path, what, disk.needed + max(0, size), disk.free)
    return list(by_device.values())


def _existing_bytes(request: Request) -> int:
    """Count the bytes of an earlier run in the output directory that this run resumes or replaces."""
    output, config = request.config.output, request.config
    if not (config.overwrite or config.resume) or not output.is_dir():
        return 0
    patterns = ["*.partial/**/*.safetensors", *["model*.safetensors"] * config.overwrite]
    return sum(path.stat().st_size for pattern in patterns for path in output.glob(pattern))
