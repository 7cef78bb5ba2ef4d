"""Chooses the device, and tells what it can do."""

import os

import torch

from llmq.core.errors import RequestError


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16 products; they make a forward pass 2 to 4 times as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, but nothing public names them
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def cores() -> int:
    """Return the number of CPU cores that this program may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name: str, default_index: int = 0) -> torch.device:
    """Return the device of this name: auto (cuda if there is a GPU), cpu, cuda (`default_index`) or cuda:N.

    Raises RequestError for any other name, and for a GPU that is not there.
    """
    kind, _, index = name.partition(":")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if kind not in ("auto", "cuda") or (index and not (kind == "cuda" and index.isdecimal())) or name.endswith(":"):
        raise RequestError(f"device must be one of auto, cpu, cuda, cuda:N; got {name!r}")
    if int(index or default_index) >= (count := torch.cuda.device_count()):
        raise RequestError(f"device {name} was asked for, but torch sees {count} CUDA GPUs; use cpu")
    return torch.device("cuda", int(index or default_index))
