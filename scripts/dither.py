"""Write a copy of a model whose linear weights are dithered off a 4-bit grid.

The demo model comes out of a 4-bit file: its weights already sit on a grid of 16 values per 32, which flatters every
4-bit result on it. Moving each weight uniformly within its cell makes it an ordinary model of about the same quality:

    w += (u - 0.5) * (max - min) / 15        per group of 32 consecutive inputs, u uniform in [0, 1)

    python scripts/dither.py --model demo --output demo-dithered
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.writer import Writer
from llmq.cli import run
from llmq.models.model_source import ModelSource

_GROUP = 32


def dither(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """w [out, in] moved by up to half a cell of its 16-level grid, in float32."""
    groups = w.float().unflatten(1, (-1, _GROUP))
    cell = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    u = torch.rand(groups.shape, generator=generator)
    return (groups + (u - 0.5) * cell).flatten(1)


@dataclass(frozen=True)
class DitherConfig:
    """Dither every linear weight of the decoder blocks and write a Hugging Face directory in float32."""

    output: Path
    """Where to write; new or empty."""
    model: str = "demo"
    """Directory, hub id, .gguf file or demo."""
    seed: int = 20261122
    """Of the uniform noise."""


def write_dithered(config: DitherConfig) -> None:
    """Copy the model, tensor by tensor."""
    source = ModelSource(config.model)
    generator = torch.Generator().manual_seed(config.seed)
    linears = {f"{n}.weight" for n, m in source.skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = tuple(f"{name}." for name in source.block_names)
    with Writer(config.output) as writer:
        for name in source.tensor_names:
            tensor = source.read(name).float()
            writer.put({name: dither(tensor, generator) if name in linears and name.startswith(blocks) else tensor})
        writer.finish(companions_of(source), torch.float32)


if __name__ == "__main__":
    run(DitherConfig, write_dithered)
