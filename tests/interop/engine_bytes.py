"""Bytes and inputs for engines that multiply by packed weights."""

from __future__ import annotations

from typing import Any

import torch

from llmq.formats.packing import pack_stream

# bits, group size, symmetric. The inputs of the demo model, 576, are no multiple of 128.
KINDS = [(bits, group, symmetric) for group in (32, 64) for symmetric in (True, False) for bits in (2, 4, 8)]


def packed_bytes(codes: torch.Tensor, bits: int) -> Any:
    """Return codes [rows, columns] as uint8 [rows, bytes]: the bytes of `weight_packed`, without padding."""
    words = pack_stream(codes, bits).contiguous()
    return words.view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)].contiguous().numpy()


def activations(columns: int) -> torch.Tensor:
    """Return x [tokens, columns]."""
    return torch.randn(16, columns, generator=torch.Generator().manual_seed(0))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
