"""Finds the linears of each block and their shapes. Blocks get random weights: only the headers of files are read."""

import math
import re
from collections import Counter
from collections.abc import Container, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.calibration.block_recorder import recorded
from llmq.calibration.block_runner import Block
from llmq.calibration.block_stream import load_block
from llmq.core.memory import release_memory
from llmq.models.block_structure import Group
from llmq.models.experts import layout_of as experts_of
from llmq.models.experts import layouts as modules_of_experts
from llmq.models.experts import routed
from llmq.models.model_source import ModelSource
from llmq.run.block_quantizer import Run
from llmq.run.layer_problem import packable_groups
from llmq.run.prepare import Request

_RANDOM_NUMBERS = 1 << 20  # drawn once; a larger tensor repeats them
_TOKENS = 16  # enough to see which linears share an input


@dataclass(frozen=True)
class Layout:
    """The linears of blocks that have the same structure."""

    blocks: tuple[str, ...]  # names of the blocks to quantize that have it
    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, int]]  # (rows, columns) of every linear
    skipped: dict[str, str]  # linears that stay in float, with the reason
    other_count: int  # parameters outside the linears
    shares: dict[str, float] = field(default_factory=dict[str, float])
    """The share of the tokens that each expert of a module gets, by the name of the module: k / E."""

    def shape(self, group: Group) -> tuple[int, int]:
        """Return (rows, columns) of a group: its linears have the same columns, their rows are stacked."""
        return sum(self.shapes[name][0] for name in group.linears), self.shapes[group.linears[0]][1]

    def weights_of(self, group: Group) -> int:
        """Count the weights of a group: rows x columns."""
        return math.prod(self.shape(group))

    def share(self, group: Group) -> float:
        """Return the share of the tokens that a group gets: all, unless it is of an expert."""
        return 1.0 if group.expert is None else self.shares[group.expert.module]

    def used(self, groups: Sequence[Group]) -> float:
        """Count the weights of these groups that a token meets, on average."""
        return sum(self.share(group) * self.weights_of(group) for group in groups)

    def moment_size(self, group: Group) -> int:
        """Count the entries of H, the second moment of a group's input: columns x columns."""
        return self.shape(group)[1] ** 2

    @property
    def weight_count(self) -> int:
        """Count the weights of all linears."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def used_count(self) -> float:
        """Count the weights of all linears that a token meets."""
        experts = [group for group in self.groups if group.expert is not None]
        return max(1, self.weight_count - sum(map(self.weights_of, experts)) + self.used(experts))


class _RandomWeights(ModelSource):
    """The same model with random weights instead of those on disk."""

    def __init__(self, source: ModelSource) -> None:
        vars(self).update(vars(source))
        self._experts = tuple(f"{name}." for name in modules_of_experts(self.skeleton))

    def load(self, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
        """Give random values to the tensors of these names."""
        state, drawn = self.skeleton.state_dict(), torch.Generator().manual_seed(0)
        base = torch.rand(_RANDOM_NUMBERS, generator=drawn).sub_(0.5).mul_(0.1).to(device, dtype)
        inside = tuple(name + "." for name in self.block_names)
        floats = {name: state[name].shape for name in names if state[name].is_floating_point()}
        # Outside the blocks all rows are parts of the same memory: embeddings can be as large as ten blocks.
        shared = {name for name, shape in floats.items() if not name.startswith(inside) and len(shape) > 1}
        # All experts have the same weights: a block of DeepSeek-V3 takes 46 GB.
        kinds = {shape: _filled(shape, base) for name, shape in floats.items() if name.startswith(self._experts)}
        own = {name: shape for name, shape in floats.items() if not name.startswith(self._experts)}
        tensors = {name: kinds[shape] for name, shape in floats.items() if name not in own}
        tensors |= {n: _repeated(s, base) if n in shared else _filled(s, base) for n, s in own.items()}
        self._assign(tensors)


def _filled(shape: torch.Size, base: Tensor) -> Tensor:
    tensor = torch.empty(shape, dtype=base.dtype, device=base.device)
    for piece in tensor.view(-1).split(len(base)):
        piece.copy_(base[: len(piece)])
    return tensor


def _repeated(shape: torch.Size, base: Tensor) -> Tensor:
    """Return a tensor of this shape. Each row begins one number after the row before, so no two tokens look alike."""
    columns = shape[1:].numel()
    step = 1 if shape[0] + columns <= len(base) else 0
    return base.as_strided((shape[0], columns), (step, 1)).unflatten(1, shape[1:])


def random_blocks(request: Request, run: Run, ids: Tensor) -> Iterator[tuple[tuple[str, ...], Block]]:
    """Yield (names of all blocks of a structure, one such block with random weights); the block is freed afterwards.

    The block gets as many random hidden states as there are tokens in `ids` [samples, length].
    """
    same: dict[object, list[str]] = {}
    for name in run.chosen:
        module = request.source.skeleton.get_submodule(name)
        inner = tuple((child, type(m).__name__, run.bits.get(f"{name}.{child}")) for child, m in module.named_modules())
        same.setdefault((inner, tuple(p.shape for p in module.parameters())), []).append(name)
    source, compute = _RandomWeights(request.source), request.compute
    with recorded(source, ids[:1], compute) as recording:
        shared = recording.shared_states()
    count = 1 if shared is not None else len(ids)  # what blocks leave for later ones is known of one sequence
    drawn = torch.Generator().manual_seed(0)
    states = torch.randn(recording.shape_for(count), generator=drawn).to(recording.sample.dtype)
    structures = {names[0]: tuple(names) for names in same.values()}
    for name, arguments in zip(source.block_names, recording.arguments, strict=True):
        if name not in structures and shared is None:
            continue
        module = load_block(source, name, compute, run.linear_dtype(compute))
        block = Block(name, module, [states], 1, arguments, compute, sample=states.narrow(recording.batch_dim, 0, 1))
        block.batch_dim, block.shared = recording.batch_dim, shared
        if shared is not None:
            block.run(states, leave=True)
        if name in structures:
            yield structures[name], block
        if shared is not None:
            shared.next_block()
        source.free(source.block_tensor_names(name, aliases=True))
        release_memory()


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that wait for the next block, for each token and each model."""

    hidden: float  # hidden states
    arguments: float  # other arguments of blocks that depend on the tokens; the same in both models
    shared: float  # what else blocks leave for later ones
    experts: int  # what enters the experts of a block; it is kept until the block is finished


def token_bytes(request: Request, run: Run) -> TokenBytes:
    """Count what waits for the next block. Only a model whose blocks share more than hidden states runs them."""
    ids, shared = request.tokens.train[:1, :_TOKENS], 0
    with recorded(_RandomWeights(request.source), ids, request.compute) as recording:
        hidden, arguments = recording.sample.nbytes, recording.argument_bytes
    if recording.shared_states() is not None:
        for _, block in random_blocks(request, run, ids):
            shared = 0 if block.shared is None else block.shared.sample_bytes
    modules = [request.source.skeleton.get_submodule(name) for name in modules_of_experts(request.source.skeleton)]
    widths = [next(m for m in module.modules() if isinstance(m, nn.Linear)).in_features for module in modules]
    experts = max(widths, default=0) * request.compute.dtype.itemsize
    return TokenBytes(hidden / ids.numel(), arguments / ids.numel(), shared / ids.numel(), experts)


def layouts(request: Request, run: Run) -> Iterator[Layout]:
    """Yield the layout of each structure among the blocks to quantize."""
    for names, block in random_blocks(request, run, request.tokens.train[:1, :_TOKENS]):
        yield layout_of(names, block, run)


def layout_of(names: tuple[str, ...], block: Block, run: Run) -> Layout:
    """Run the block once and return its layout."""
    with _shares(block) as shares:
        groups, skipped = packable_groups(block, run.source, run.bits)
    linears = {name: m.weight for name, m in block.module.named_modules() if isinstance(m, nn.Linear)}
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in linears.items()}
    count = sum(parameter.numel() for parameter in block.module.parameters())
    return Layout(names, tuple(groups), shapes, skipped, count - sum(w.numel() for w in linears.values()), shares)


@contextmanager
def _shares(block: Block) -> Generator[dict[str, float]]:
    """Give the share of the tokens that each expert of a module gets while the block runs inside, by the module."""
    shares = dict[str, float]()
    with ExitStack() as hooks:
        for name in modules_of_experts(block.module):

            def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                layout = experts_of(module)
                assert layout is not None
                tokens = args[0].flatten(0, -2).shape[0] // (layout.experts if layout.scored else 1)
                shares[name] = routed(module, args).index.numel() / layout.experts / tokens

            hooks.enter_context(block.module.get_submodule(name).register_forward_pre_hook(note))
        yield shares


def block_ranges(blocks: Sequence[str], some: Container[str]) -> str:
    """Return the positions of some of the blocks as text, such as 0-2,5."""
    positions = [i for i, name in enumerate(blocks) if name in some]
    starts = [n for i, n in enumerate(positions) if i == 0 or positions[i - 1] != n - 1]
    ends = [n for i, n in enumerate(positions) if i == len(positions) - 1 or positions[i + 1] != n + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def counted(texts: Iterable[str]) -> Iterator[str]:
    """Yield each text once, with numbers in names as * and how often it came: the experts of a block are alike."""
    for text, count in Counter(re.sub(r"\.\d+\.", ".*.", text) for text in texts).items():
        yield f"{text}, {count} of them" if count > 1 else text
