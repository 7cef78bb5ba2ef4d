"""What blocks are made of, seen on blocks with random weights: nothing is read but the headers of files."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.calibration.block_runner import Block
from llmq.calibration.block_stream import load_block, record_block_inputs
from llmq.core.memory import release_memory
from llmq.models.block_structure import Group, find_groups, split_packable
from llmq.models.model_source import ModelSource
from llmq.run.block_quantizer import Run
from llmq.run.prepare import Request

_RANDOM = 1 << 20  # numbers that are drawn; more are these over again
_FEW = 16  # tokens that show what a block is made of


@dataclass(frozen=True)
class Layout:
    """What blocks of one structure are made of."""

    blocks: tuple[str, ...]
    """Those to quantize."""
    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, int]]
    """(rows, columns) of every linear."""
    skipped: dict[str, str]
    """Linears that stay in float, with the reason."""
    others: int
    """Numbers outside the linears."""

    def shape(self, group: Group) -> tuple[int, int]:
        """(rows of all linears, columns)."""
        return sum(self.shapes[name][0] for name in group.linears), self.shapes[group.linears[0]][1]

    def size(self, group: Group) -> int:
        """Numbers in the linears of a group."""
        rows, columns = self.shape(group)
        return rows * columns

    def square(self, group: Group) -> int:
        """Numbers in the statistics of its input."""
        return self.shape(group)[1] ** 2

    @property
    def numbers(self) -> int:
        """Numbers in the linears."""
        return sum(rows * columns for rows, columns in self.shapes.values())


class _Imagined(ModelSource):
    """The same model with random weights in the place of those on disk."""

    def __init__(self, source: ModelSource) -> None:
        vars(self).update(vars(source))

    def load(self, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
        state = self.skeleton.state_dict()
        base = torch.rand(_RANDOM, generator=torch.Generator().manual_seed(0)).sub_(0.5).mul_(0.1).to(device, dtype)
        inside = tuple(name + "." for name in self.block_names)
        floats = {name: state[name].shape for name in names if state[name].is_floating_point()}
        # Outside the blocks one row stands for all: embeddings can be as large as ten blocks.
        self._assign(
            {
                name: _filled(shape, base) if name.startswith(inside) or len(shape) < 2 else _repeated(shape, base)
                for name, shape in floats.items()
            }
        )


def _filled(shape: torch.Size, base: Tensor) -> Tensor:
    tensor = torch.empty(shape, dtype=base.dtype, device=base.device)
    for part in tensor.view(-1).split(len(base)):
        part.copy_(base[: len(part)])
    return tensor


def _repeated(shape: torch.Size, base: Tensor) -> Tensor:
    return base[: shape[1:].numel()].view(1, *shape[1:]).expand(shape)


def imagined_blocks(request: Request, run: Run, ids: Tensor) -> Iterator[tuple[tuple[str, ...], Block]]:
    """One block for each structure among those to quantize, with the names of all that have it; freed afterwards.

    Args:
        ids: [samples, length] tokens that enter it; their hidden states are random.
    """
    alike: dict[object, list[str]] = {}
    for name in run.chosen:
        module = request.source.skeleton.get_submodule(name)
        parts = tuple((inner, type(m).__name__, run.bits.get(f"{name}.{inner}")) for inner, m in module.named_modules())
        alike.setdefault((parts, tuple(p.shape for p in module.parameters())), []).append(name)
    source, compute = _Imagined(request.source), request.compute
    hidden, arguments = record_block_inputs(source, ids[:1], compute)
    drawn = torch.Generator().manual_seed(0)
    states = torch.randn(len(ids), *hidden.shape[1:], generator=drawn).to(hidden.dtype)
    for names in alike.values():
        module = load_block(source, names[0], compute, run.linear_dtype(compute))
        yield tuple(names), Block(names[0], module, [states], 1, arguments[source.block_names.index(names[0])], compute)
        source.free(source.block_tensor_names(names[0]))
        release_memory()


def layouts(request: Request, run: Run) -> Iterator[Layout]:
    """What the blocks to quantize are made of, each structure once."""
    for names, block in imagined_blocks(request, run, request.tokens.train[:1, :_FEW]):
        yield layout_of(names, block)


def layout_of(names: tuple[str, ...], block: Block) -> Layout:
    """What a block is made of."""
    assert block.sample is not None
    groups, skipped = split_packable(block.module, find_groups(block.module, block.run, block.sample))
    linears = {name: m.weight for name, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in linears.items()}
    every = sum(parameter.numel() for parameter in block.module.parameters())
    return Layout(names, tuple(groups), shapes, skipped, every - sum(w.numel() for w in linears.values()))


def numbers_of(blocks: Sequence[str], some: Container[str]) -> str:
    """Which of the blocks these are, as 0-2,5."""
    numbers = [i for i, name in enumerate(blocks) if name in some]
    starts = [n for i, n in enumerate(numbers) if i == 0 or numbers[i - 1] != n - 1]
    ends = [n for i, n in enumerate(numbers) if i == len(numbers) - 1 or numbers[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
