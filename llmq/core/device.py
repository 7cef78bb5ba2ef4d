"""Chooses the device, and tells what it can do."""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq.core.errors import RequestError


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16 products; they make a forward pass 2 to 4 times as fast."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, but nothing public names them
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of products that may be rounded: bfloat16 if the device is fast at it, else float32."""
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


@contextmanager
def full_float32() -> Generator[None]:
    """Multiply float32 with all of its bits inside, and set back at the end what the program had chosen.

    TensorFloat-32 keeps 10 bits of each factor, oneDNN's bfloat16 mode keeps 7. A library, a notebook or a container
    may have turned them on for the whole process.
    """
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


@contextmanager
def bfloat16_products() -> Generator[None]:
    """Let a CPU multiply float32 factors in bfloat16 inside, and sum in float32. The factors must be bfloat16 numbers.

    Then the products are exact. With AVX-512 it takes half the time of MKL's float32, even if oneDNN uses no bfloat16:
    XᵀX of 1024 x 1536 in 6.8 ms instead of 14.3 (2 cores of an AMD EPYC with AVX512_BF16, torch 2.13, 2026-11-29).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def on_host(value: Tensor) -> float | Tensor:
    """Return a number; on a GPU, the tensor that will hold it, for `numbers` to read."""
    return float(value) if value.device.type == "cpu" else value


def numbers(values: Sequence[int | float | Tensor]) -> list[float]:
    """Return numbers, of which some or all may be on a GPU: it is waited for once, not once for each."""
    if not any(isinstance(value, Tensor) for value in values):
        return [float(value) for value in values]
    device = next(value.device for value in values if isinstance(value, Tensor))
    whole = {"dtype": torch.float64, "device": device}
    return torch.stack([v.double() if isinstance(v, Tensor) else torch.full((), v, **whole) for v in values]).tolist()


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
