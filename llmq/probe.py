"""What a run will meet, tried out on blocks with random weights: what they are made of, how long the work takes.

Nothing is read but the headers of files. Only `prove` reads weights: those of a few linears, through the whole format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmq.algorithms.match import choose, matched
from llmq.algorithms.problem import Problem, energy, lost_energy, round_to_nearest
from llmq.arch import Group, find_groups, packable_widths, split_packable
from llmq.block import Block
from llmq.blockwise import Run
from llmq.clock import Clock
from llmq.digest import digest
from llmq.errors import CheckpointError, WorkError
from llmq.formats.scheme import Scheme
from llmq.memory import release_memory
from llmq.request import Request
from llmq.settings import Grid
from llmq.source import ModelSource
from llmq.statistics import InputStatistics
from llmq.stream import record_block_inputs
from llmq.weight import QuantizedWeight

_RANDOM = 1 << 20  # numbers that are drawn; more are these over again
_FEW = 16  # tokens that show what a block is made of
_TRIES, _LONG = 5, 0.2  # of work that is timed; seconds after which it is not tried again
# A group of n columns takes some 3 n³ products, and 5 n² for each row (gptq, 2026-11-25); more than this is noise.
_PRODUCTS = (6, 10)
_ROWS = (256, 768)  # of problems that are timed: 256 rows choose for all in any case
_STRIP = 1024  # rows proved at once


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
        here, module = source.block_tensor_names(names[0]), source.skeleton.get_submodule(names[0])
        linears = {f"{names[0]}.{inner}.weight" for inner, m in module.named_modules() if isinstance(m, nn.Linear)}
        source.load([name for name in here if name in linears], compute.device, linear_dtype(request, run))
        source.load([name for name in here if name not in linears], compute.device, compute.dtype)
        yield tuple(names), Block(names[0], module, [states], 1, arguments[source.block_names.index(names[0])], compute)
        source.free(here)
        release_memory()


def linear_dtype(request: Request, run: Run) -> torch.dtype:
    """In which a block's linears are loaded: as they are stored, where matmuls take that and nothing changes them."""
    compute = request.compute
    as_stored = run.algorithm.transform is None and request.source.dtype == compute.factors
    return compute.factors if as_stored else compute.dtype


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


@dataclass(frozen=True)
class Speeds:
    """Seconds that each unit of work takes here."""

    product: float
    """A multiplication in float32 among many."""
    number: float
    """Added to another in a large sum."""
    solve: tuple[float, float, float, float]
    """A group of n columns takes a·n + b·n³, and for each row c·n + d·n²."""
    weight: float
    """Of a linear, to be encoded, hashed, decoded and hashed again."""
    byte: float
    """Of a tensor that is copied as it is: looked at, and hashed twice."""

    def solving(self, rows: float, columns: int) -> float:
        a, b, c, d = self.solve
        return columns * (a + b * columns**2 + rows * (c + d * columns))


def speeds_of(run: Run, widest: int) -> Speeds:
    """Time every kind of work for a moment. `widest`: columns of the widest linear."""
    drawn = torch.Generator().manual_seed(0)
    A, H = torch.randn(1024, 2048, generator=drawn).to(run.device), torch.zeros(256, 2048, device=run.device)
    plain = A.to(run.scale_dtype)
    weight = _some_weight(run)
    product = _seconds(lambda: H.addmm_(A[:, :256].T, A)) / (A.numel() * 256)
    return Speeds(
        product=product,
        number=_seconds(lambda: A.add_(A)) / A.numel(),
        solve=_solve_seconds(run, product, *((512, 1024) if widest <= 2048 else (1024, 2048))),
        weight=_seconds(lambda: (digest(weight), digest(_there_and_back(run, "linear", weight)))) / weight.q.numel(),
        byte=_seconds(lambda: (torch.isfinite(plain).all(), digest(plain), digest(plain))) / plain.nbytes,
    )


def token_seconds(block: Block) -> float:
    """Of each token that goes through the block."""
    hidden = block.hidden[0]
    with block.many_runs():
        return _seconds(lambda: block.run(hidden)) / hidden.shape[:2].numel()


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few tries, of one if that took long: others may be at work on the machine."""
    found: list[float] = []
    while len(found) < _TRIES and sum(found) < _LONG:
        clock = Clock()
        with clock("work"):
            work()
        found.append(clock.seconds["work"])
    return min(found)


def _solve_seconds(run: Run, product: float, narrow: int, wide: int) -> tuple[float, float, float, float]:
    """Factors of n, n³, and for each row of n and n², for groups of n columns: see Speeds."""
    _line(run, _ROWS[0])  # the first time is the slowest
    whole_wide, row_wide = _line(run, wide)
    if not run.algorithm.needs_statistics(run.config):  # every weight by itself
        return whole_wide / wide, 0.0, row_wide / wide, 0.0
    whole, row = _line(run, narrow)
    # What other programs add to one of them would grow with the columns beyond all reason.
    most = tuple(product * times * (2 if run.config.effort == "best" else 1) for times in _PRODUCTS)
    b = min(most[0], max(0.0, (whole_wide / wide - whole / narrow) / (wide**2 - narrow**2)))
    d = min(most[1], max(0.0, (row_wide / wide - row / narrow) / (wide - narrow)))
    return max(0.0, whole_wide / wide - b * wide**2), b, max(0.0, row_wide / wide - d * wide), d


def _line(run: Run, columns: int) -> tuple[float, float]:
    """Seconds of a problem of about so many columns, as (whole, each row)."""
    size = columns if run.grid.group_size == -1 else min(columns, run.grid.group_size)
    grid = replace(run.grid, group_size=size)
    problems = [_posed(run, rows, columns // size * size, grid) for rows in _ROWS]
    less, more = (_seconds(partial(_solve, run, problem)) for problem in problems)
    row = max(0.0, more - less) / (_ROWS[1] - _ROWS[0])
    return max(0.0, less - row * _ROWS[0]), row


def _posed(run: Run, rows: int, columns: int, grid: Grid) -> Problem:
    drawn = torch.Generator().manual_seed(0)
    W, statistics = torch.randn(rows, columns, generator=drawn).to(run.device), None
    if run.algorithm.needs_statistics(run.config):
        X = torch.randn(columns, columns, generator=drawn).to(run.device)
        H = (X + X.T).mul_(0.2 / columns**0.5)
        H.diagonal().add_(1.0)  # its eigenvalues are positive
        ones, lack = torch.ones(columns, device=run.device), W.flip(0) if run.matching else None
        statistics = InputStatistics(H, H, ones, columns, 0, lack, lack)
    clippable = torch.ones(rows, dtype=torch.bool, device=run.device)
    return Problem(W, statistics, grid, run.scale_dtype, clippable)


def _solve(run: Run, problem: Problem) -> None:
    """What is done to a group of linears once its statistics are there."""
    problem = replace(problem, W=matched(problem, choose(problem)))
    H = None if problem.statistics is None else problem.statistics.H
    solution = run.algorithm.solve(problem, run.config)
    for each in (solution,) if run.algorithm.is_nearest(run.config) else (solution, round_to_nearest(problem)):
        lost_energy(problem, each, H)
    energy(problem.W, H)
    solution.dequantize(problem.grid.group_size)


def _some_weight(run: Run) -> QuantizedWeight:
    size = run.grid.group_size
    columns = 1024 if size == -1 else 32 * size
    rows = max(32, _RANDOM // columns // 32 * 32)
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return _nearest(run, W, run.config.bits)


def packed_bytes(run: Run, shape: tuple[int, int], bits: int) -> int:
    """Of the tensors of a linear in the format of the run: those it would write, without their data."""
    scheme = Scheme(bits, run.grid.group_size, run.grid.symmetric)
    q = torch.empty(shape, dtype=torch.uint8, device="meta")
    scale = torch.empty(shape[0], scheme.groups(shape[1]), dtype=run.scale_dtype, device="meta")
    weight = QuantizedWeight(q, scale, torch.empty(scale.shape, dtype=torch.uint8, device="meta"), bits)
    return sum(tensor.nbytes for tensor in run.format.encode("linear", weight, scheme).values())


def prove(run: Run) -> None:
    """Take weights of the first block through the whole format: linears of each shape and number of bits.

    Raises WorkError if other codes, scales or zero points come back than went in, or weights that are not finite.
    """
    block, seen = run.chosen[0], set[tuple[torch.Size, int]]()
    for inner, module in run.source.skeleton.get_submodule(block).named_modules():
        name = f"{block}.{inner}"
        if not isinstance(module, nn.Linear) or not packable_widths([module]):
            continue
        if (module.weight.shape, run.bits[name]) not in seen:
            seen.add((module.weight.shape, run.bits[name]))
            for rows in run.source.read(f"{name}.weight").split(_STRIP):
                _prove(run, name, _nearest(run, rows, run.bits[name]))


def _prove(run: Run, name: str, weight: QuantizedWeight) -> None:
    """Raise WorkError unless a weight survives the format."""
    wrong = f"{name} does not survive being written in format {run.config.stored_as}"
    try:
        found = _there_and_back(run, name, weight)
    except CheckpointError as error:
        raise WorkError(f"{wrong}: {error}") from None
    for part, what in (("q", "codes"), ("scale", "scales"), ("zero", "zero points")):
        before, after = getattr(weight, part).cpu(), getattr(found, part)
        if before.dtype != after.dtype or not torch.equal(before, after):
            raise WorkError(f"{wrong}: other {what} come back; please report it, and choose another --format")
    if not bool(torch.isfinite(found.dequantize()).all()):
        raise WorkError(f"{wrong}: its weights are not finite; choose another --group-size or --format")


def _nearest(run: Run, W: Tensor, bits: int) -> QuantizedWeight:
    """Rounded to nearest on the grid of the run."""
    size = W.shape[1] if run.grid.group_size == -1 else run.grid.group_size
    grid = replace(run.grid, group_size=size, bits=bits)
    clippable = torch.ones(len(W), dtype=torch.bool, device=run.device)
    found = round_to_nearest(Problem(W.to(run.device, torch.float32), None, grid, run.scale_dtype, clippable))
    return QuantizedWeight(found.q, found.scale, found.zero, bits)


def _there_and_back(run: Run, name: str, weight: QuantizedWeight) -> QuantizedWeight:
    """What a reader of the checkpoint makes of a weight."""
    scheme = Scheme(weight.bits, run.grid.group_size, run.grid.symmetric)
    tensors = {part: tensor.cpu() for part, tensor in run.format.encode(name, weight, scheme).items()}
    config = run.format.hf_config({name: scheme}, [])
    return run.format.decode(name, tensors, run.format.schemes_of(config, [name])[name])
