"""Write a copy of a model and dither its linear weights: move each one at random, so that it is off its 4-bit grid.

The demo model comes from a 4-bit file. So its weights already lie on a grid: 16 values for every 32 weights. This makes
every 4-bit result on it look better than it is. The script moves each weight uniformly within its grid cell. The result
is an ordinary model of about the same quality:

    w += (u - 0.5) * (max - min) / 15        per group of 32 consecutive inputs, u uniform in [0, 1)

    python scripts/dither.py --model demo --output demo-dithered
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.writer import Writer
from llmq.cli import run
from llmq.models.model_source import ModelSource

_GROUP = 32


def dither(w: Tensor, generator: torch.Generator) -> Tensor:
    """Return w [out, in] in float32, each weight moved by up to half a cell of its 16-level grid."""
    groups = w.float().unflatten(1, (-1, _GROUP))
    cell = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    u = torch.rand(groups.shape, generator=generator)
    return (groups + (u - 0.5) * cell).flatten(1)


@dataclass(frozen=True)
class DitherConfig:
    """Dither every linear weight of the decoder blocks and write a Hugging Face directory in float32."""

    output: Path
    """Directory to write to; it must be new or empty."""
    model: str = "demo"
    """Directory, hub id, .gguf file, or demo for the demo model."""
    seed: int = 20261122
    """Seed of the random moves."""


def write_dithered(config: DitherConfig) -> None:
    """Copy the model tensor by tensor, and dither the linear weights of its blocks."""
    source = ModelSource(config.model)
    with Writer(config.output) as writer:
        for name, tensor, _ in dithered(source, config.seed):
            writer.put({name: tensor})
        writer.finish(companions_of(source), torch.float32)


def dithered(source: ModelSource, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the name of each tensor, its values in the dithered model, and those in the source, in float32."""
    generator = torch.Generator().manual_seed(seed)
    linears = {f"{n}.weight" for n, m in source.skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    blocks = tuple(f"{name}." for name in source.block_names)
    for name in source.tensor_names:
        tensor = source.read(name).float()
        yield name, dither(tensor, generator) if name in linears and name.startswith(blocks) else tensor, tensor


if __name__ == "__main__":
    run(DitherConfig, write_dithered)
