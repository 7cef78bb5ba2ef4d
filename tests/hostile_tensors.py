"""Ways to damage the safetensors files of a checkpoint: see hostile.py."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save
from strange import DTYPES, WORDS, strange


@dataclass(frozen=True)
class Odd:
    """What lies where a file should: a link to `target`, a folder or a pipe."""

    kind: str
    target: str = ""


Files = dict[str, "bytes | Odd"]
"""What to put into a directory, by name."""


def shards(files: Files) -> list[str]:
    """The names of its safetensors files."""
    return sorted(name for name in files if name.endswith(".safetensors"))


def header_length(draw: Callable[..., Any], files: Files) -> bool:
    """The first eight bytes of a shard lie about where its tensors begin."""
    name = draw(st.sampled_from(shards(files)))
    length = struct.unpack("<Q", files[name][:8])[0]
    sizes = [0, 1, 2, len(files[name]), len(files[name]) - 8, 10**8, 10**8 + 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
    near = st.integers(-20, 20).filter(bool).map(lambda step: length + step)
    files[name] = struct.pack("<Q", draw(st.sampled_from(sizes) | near)) + files[name][8:]
    return True


def header(draw: Callable[..., Any], files: Files) -> bool:
    """The header of a shard lies about its tensors."""
    name = draw(st.sampled_from(shards(files)))
    length = struct.unpack("<Q", files[name][:8])[0]
    table, data = json.loads(files[name][8 : 8 + length]), files[name][8 + length :]
    entry, other = (draw(st.sampled_from(sorted(table.keys() - {"__metadata__"}))) for _ in range(2))
    what = draw(st.sampled_from(["dtype", "shape", "offsets", "swap", "rename", "drop", "replace", "metadata"]))
    if what == "dtype":
        table[entry]["dtype"] = draw(st.sampled_from(DTYPES) | strange)
    elif what == "shape":
        _strange_list(draw, table[entry], "shape")
    elif what == "offsets":
        _strange_list(draw, table[entry], "data_offsets")
    elif what == "swap":
        key = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        table[entry][key], table[other][key] = table[other][key], table[entry][key]
    elif what == "rename":
        table[draw(st.sampled_from([other, *WORDS, entry + ".x", "a\n" * 9, "lm_head.qweight"]))] = table.pop(entry)
    elif what == "drop":
        del table[entry]
    elif what == "replace":
        table[entry] = draw(strange)
    else:
        table["__metadata__"] = draw(strange)
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    files[name] = struct.pack("<Q", len(text)) + text + data
    return False


def tensor(draw: Callable[..., Any], files: Files) -> bool:
    """A tensor has another type, shape or values; or is missing; or one too many is there."""
    shard = draw(st.sampled_from(shards(files)))
    tensors = load(files[shard])
    name = draw(st.sampled_from(sorted(tensors)))
    old = tensors[name]
    what = draw(st.sampled_from(["dtype", "shape", "values", "drop", "add", "head"]))
    if what == "dtype":
        kinds = "float64 float32 float16 bfloat16 int64 int32 int16 uint8 bool float8_e4m3fn complex64"
        tensors[name] = old.to(getattr(torch, draw(st.sampled_from(kinds.split()))))
    elif what == "shape":
        tensors[name] = draw(st.sampled_from(_RESHAPED))(old).contiguous().clone()
    elif what == "values":
        tensors[name] = _other_values(draw, old)
    elif what == "drop":
        del tensors[name]
    elif what == "add":
        parent, _, leaf = name.rpartition(".")
        added = [name + ".x", parent, f"{parent}.bias", f"{parent}.g_idx", f".{leaf}", leaf, f"{parent}.weight"]
        tensors[draw(st.sampled_from([*added, "lm_head.weight", "x.inv_freq"]))] = draw(
            st.sampled_from([torch.zeros(64), torch.ones(64), old.clone()])
        )
    else:  # a packed head, which a model whose embeddings are tied to it cannot have
        parent = name.rpartition(".")[0]
        tensors |= {f"lm_head{n[len(parent) :]}": t.clone() for n, t in tensors.items() if n.startswith(parent)}
    files[shard] = save(tensors, metadata={"format": "pt"})
    return False


_RESHAPED = [
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.T if t.ndim == 2 else t[:-1],
    lambda t: t[..., :-1],
    lambda t: t[:0],
    lambda t: torch.cat([t, t]),
    lambda t: t.flatten()[0] if t.numel() else t,
    lambda t: t.flatten()[None],
]


def _other_values(draw: Callable[..., Any], old: torch.Tensor) -> torch.Tensor:
    new = old.clone()
    spot = slice(None) if draw(st.booleans()) else draw(st.integers(0, old.numel() - 1))
    if old.is_floating_point():
        value = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e30, -65504.0, 1e-8, 3.0]))
    else:
        value = draw(st.sampled_from([0, 1, -1, 2, 3, 64, 10**6, 2**31 - 1, -(2**31)]))
    new.view(-1)[spot] = value
    return new


def _strange_list(draw: Callable[..., Any], entry: dict[str, Any], key: str) -> None:
    """Put something strange in the place of a list of numbers, or of one of them."""
    numbers = copy.copy(entry[key])
    if numbers and draw(st.sampled_from([True, True, False])):
        numbers[draw(st.integers(0, len(numbers) - 1))] = draw(strange | st.integers(0, 100_000))
        entry[key] = numbers
    else:
        entry[key] = draw(
            st.sampled_from([numbers[::-1], numbers + numbers, [2**40] * 3, [0], [*numbers, 1]]) | strange
        )
