"""Join the parts that the Writer wrote into the shards of a checkpoint.

part 0: a b | part 1: c d | part 2: e        written while blocks finish
shard 1: a b c d          | shard 2: e       joined when all parts are on disk, widest numbers first
"""

import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmq.checkpoint.output_dir import write_json, written_whole
from llmq.core.errors import CheckpointError
from llmq.models.safetensors_files import INDEX, SINGLE

StackOf: TypeAlias = Callable[[str], "tuple[str, int] | None"]
"""Takes the name of a tensor; returns the stack that it is a part of and its number there, or None."""


def join_shards(
    parts: Sequence[Path], plan_file: Path, directory: Path, shard_bytes: int, stack_of: StackOf | None = None
) -> None:
    """Replace all parts by shards in `directory`, one after the other, and write an index if there are several shards.

    The disk holds one shard twice at most. The plan, which parts go into which shard, is written down first. So if the
    process is killed, another one can continue: shards that are there stay, the parts of the others are still there.

    `stack_of`: which tensors are written as one, which must be in neighbouring parts; None: none.
    """
    if not plan_file.exists():
        tensors = [tensors_in([part]) for part in parts]
        sizes = [sum(tensor.nbytes for tensor in each.values()) for each in tensors]
        stacks = [{found[0] for found in map(stack_of, each) if found} if stack_of else set[str]() for each in tensors]
        bound = [i > 0 and not stacks[i].isdisjoint(stacks[i - 1]) for i in range(len(parts))]
        write_json(plan_file, {"shards": grouped(sizes, shard_bytes, bound), "total_size": sum(sizes)})
    plan = json.loads(plan_file.read_text())
    weight_map: dict[str, str] = {}
    for i, members in enumerate(plan["shards"], start=1):
        name = SINGLE if len(plan["shards"]) == 1 else f"model-{i:05}-of-{len(plan['shards']):05}.safetensors"
        if not (directory / name).exists():
            join([parts[k] for k in members], directory / name, stack_of)
        for k in members:
            parts[k].unlink(missing_ok=True)
        weight_map |= dict.fromkeys(tensors_in([directory / name]), name)
    if len(plan["shards"]) > 1:
        index = {"metadata": {"total_size": plan["total_size"]}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)


def join(parts: Sequence[Path], path: Path, stack_of: StackOf | None = None) -> None:
    """Write the tensors of all parts into one safetensors file, with one tensor in memory at a time.

    `safetensors.torch.save_file` is not used. It needs all tensors at once: 1.0 GB more for 1 GB of parts (2.0 GB with
    safetensors 0.7; 2026-11-28). It also sorts by dtype before name, so the same run would write other bytes.
    """
    tensors: list[tuple[int, str, int, str, Path, str, list[int], int]] = []
    for part in parts:
        with _opened(part) as file:
            for name in file.keys():  # noqa: SIM118 it is no mapping
                tensor, stored = file.get_tensor(name), file.get_slice(name)
                width, dtype, shape = tensor.itemsize, stored.get_dtype(), stored.get_shape()
                stack, number = (stack_of and stack_of(name)) or (name, -1)
                tensors.append((-width, stack, number, name, part, dtype, shape, tensor.nbytes))
    tensors.sort()  # wide numbers first: every tensor begins at a multiple of the width of its numbers
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, stack, number, *_, dtype, shape, size in tensors:
        begin = end
        if number >= 0:  # a part of a stack, right behind the part before it
            before = header.get(stack, {"dtype": dtype, "shape": [0, *shape], "data_offsets": [end, end]})
            if before["dtype"] != dtype or before["shape"] != [number, *shape]:
                raise CheckpointError(f"{stack}: its parts are not all there, or differ, so they cannot be stacked")
            begin, shape = before["data_offsets"][0], [number + 1, *shape]
        header[stack] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as new, new.open("wb") as target:
        target.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, name, part, *_ in tensors:
            with _opened(part) as file:
                target.write(file.get_tensor(name).flatten().view(torch.uint8).numpy().data)


def tensors_in(paths: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files, mapped from disk. Raises OSError if a file is damaged."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with _opened(path) as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """Open a safetensors file. Raises OSError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise OSError(f"{path} is damaged ({error})") from None


def grouped(sizes: Sequence[int], most: int, bound: Sequence[bool] = ()) -> list[list[int]]:
    """Return the indices of consecutive parts, in groups of at most `most` bytes. A larger part is a group alone.

    `bound`: whether a part must be with the one before it, whatever their size.
    """
    groups: list[list[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or (size > room and not (bound and bound[i])):
            groups.append([])
            room = most
        groups[-1].append(i)
        room -= size
    return groups
