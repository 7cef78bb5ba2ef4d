"""Packed weights and checkpoints for tests, and the dense models they must behave like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core import affine_grid
from llmq.core.quantized_weight import QuantizedWeight
from llmq.models.model_source import ModelSource


def random_weight(
    rows: int,
    columns: int,
    groups: int = 1,
    bits: int = 4,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> QuantizedWeight:
    """Random codes with scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    magnitude = 0.01 + 0.1 * torch.rand(rows, groups, generator=generator)
    sign = torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
    if symmetric:
        zero = torch.full((rows, groups), 2 ** (bits - 1), dtype=torch.uint8)
    else:
        zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).to(torch.uint8)
    return QuantizedWeight(q, (magnitude * sign).to(dtype), zero, bits)


def with_real_zeros(weight: QuantizedWeight, seed: int = 0) -> QuantizedWeight:
    """The same codes and scales with zero points that are no codes, as biases can store them."""
    shift = torch.rand(weight.scale.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return replace(weight, zero=affine_grid.storable_zero(weight.scale, weight.zero + shift))


def assert_same_weight(one: QuantizedWeight, other: QuantizedWeight) -> None:
    """Fail unless two weights have the same numbers in the same dtypes."""
    assert one.bits == other.bits
    for a, b in ((one.q, other.q), (one.scale, other.scale), (one.zero, other.zero), (one.group_of, other.group_of)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def pack(source: Path | str, output: Path, **options: Any) -> Path:
    """Quantize by rounding to nearest, which needs no calibration text; `options` go to QuantizeConfig."""
    settings = {"method": "rtn", "format": "compressed-tensors", "device": "cpu", "group_size": 32} | options
    return llmq.quantize(llmq.QuantizeConfig(model=str(source), output=output, **settings))


def dequantized_model(source: Path | str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The source model in float32 with dense linears of the values the checkpoint stands for, computed in `dtype`."""
    model = ModelSource(str(source)).load_all(torch.device("cpu"), torch.float32)
    return put_dequantized(model, directory, dtype)


@torch.no_grad()
def put_dequantized(model: Any, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Overwrite the linears of a dense model that the checkpoint packs; returns the model."""
    checkpoint = Checkpoint(directory).for_model(model)
    assert checkpoint.linears
    for name in checkpoint.linears:
        model.get_submodule(name).weight.copy_(checkpoint.weight(name).dequantize(dtype))
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def some_tokens(batch: int = 2, length: int = 70, seed: int = 0) -> torch.Tensor:
    """Ids for the tiny models. By default more than 64 of them, so that 4-bit linears compute in float32."""
    return torch.randint(0, 384, (batch, length), generator=torch.Generator().manual_seed(seed))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Let `change` alter the tensors of a one-shard directory in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
