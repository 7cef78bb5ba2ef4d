"""Join the parts that the Writer wrote into the shards of a checkpoint.

part 0: a b | part 1: c d | part 2: e        written while blocks finish
shard 1: a b c d          | shard 2: e       joined when all parts are on disk
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmq.checkpoint.output_dir import write_json, written_whole
from llmq.models.safetensors_files import INDEX, SINGLE


def join_shards(parts: Sequence[Path], plan_file: Path, directory: Path, shard_bytes: int) -> None:
    """Replace all parts by shards in `directory`, one after the other, and write an index if there are several shards.

    The disk holds one shard twice at most. The plan, which parts go into which shard, is written down first. So if the
    process is killed, another one can continue: shards that are there stay, the parts of the others are still there.
    """
    if not plan_file.exists():
        sizes = [sum(tensor.nbytes for tensor in tensors_in([part]).values()) for part in parts]
        write_json(plan_file, {"shards": grouped(sizes, shard_bytes), "total_size": sum(sizes)})
    plan = json.loads(plan_file.read_text())
    weight_map: dict[str, str] = {}
    for i, members in enumerate(plan["shards"], start=1):
        name = SINGLE if len(plan["shards"]) == 1 else f"model-{i:05}-of-{len(plan['shards']):05}.safetensors"
        if not (directory / name).exists():
            join([parts[k] for k in members], directory / name)
        for k in members:
            parts[k].unlink(missing_ok=True)
        weight_map |= dict.fromkeys(tensors_in([directory / name]), name)
    if len(plan["shards"]) > 1:
        index = {"metadata": {"total_size": plan["total_size"]}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)


def join(parts: Sequence[Path], path: Path) -> None:
    """Write the tensors of all parts into one safetensors file.

    The parts are mapped, not read: 1 GB of them takes 1 GB of pages that the system may drop, and no other memory
    (safetensors 0.8.0; version 0.7.0 copied them and took 1 GB more; 2026-11-28).
    """
    with written_whole(path) as new:
        new.touch()
        mode = new.stat().st_mode  # what the umask gives; safetensors makes files that only their owner may read
        save_file(tensors_in(parts), new, metadata={"format": "pt"})
        new.chmod(mode)


def tensors_in(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files, mapped from disk. Raises OSError if a file is damaged."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise OSError(f"{path} is damaged ({error})") from None
    return tensors


def grouped(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Return the indices of consecutive parts, in groups of at most `most` bytes. A larger part is a group alone."""
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    return groups
