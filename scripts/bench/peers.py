"""Every way to multiply by a weight that is timed: ours, the vendor's library, and other projects' kernels."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llmq_kernels import new_counters
from llmq_kernels.choose import Problem, Tile
from llmq_kernels.layout import pack
from llmq_kernels.trial import multiply, nbytes, random_codes, random_tokens, rotated
from torch import Tensor

from bench import pool
from bench.correctness import exact_weight
from bench.machine import Machine, the_machine
from bench.plan import Plan
from bench.session import Session, Task

Product = Callable[[Tensor], Tensor]


class Products(NamedTuple):
    """x -> x Wᵀ over each of some copies of a weight in turn, and the bytes of one copy."""

    copies: Sequence[Product]
    weight_bytes: int


class Layer:
    """A random weight in every path's own layout, each made when it is first asked for and kept."""

    def __init__(self, machine: Machine, problem: Problem, rotation: float) -> None:
        self.machine, self.problem, self._rotation = machine, problem, rotation
        self._counters = new_counters(machine.where)
        self._made: dict[Any, Products] = {}

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scale, zero)."""
        return random_codes(self.problem, self.machine.where)

    @cached_property
    def _packed(self) -> list[Any]:
        return rotated(pack(*self.codes, self.problem.bits), self._rotation)

    def exact(self) -> Tensor:
        """[N, K] in float64; large, so not kept."""
        return exact_weight(*self.codes)

    def fused(self, tile: Tile | None) -> Products:
        """Ours: with a tile, or, with None, dequantizing first."""
        products = [lambda x, w=w: multiply(x, w, tile, self._counters) for w in self._packed]
        return Products(products, nbytes(self._packed[0]))

    def products(self, path: str) -> Products:
        """The copies of a peer's weight."""
        if path not in self._made:
            self._made[path] = _PEERS[path](self)
        return self._made[path]

    def copies(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Clones of a layout's tensors, as many as the rotation takes."""
        count = max(2, math.ceil(self._rotation / sum(tensor.nbytes for tensor in tensors)))
        return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def _cublas(layer: Layer, dtype: torch.dtype) -> Products:
    W = layer.exact().to(dtype)
    return Products([lambda x, w=w: torch.mm(x, w.T) for (w,) in layer.copies([W])], W.nbytes)


def _tinygemm(layer: Layer) -> Products:
    """torch's int4 kernel: w = (code - 8) * scale + offset, all in bfloat16."""
    codes, scale, zero = layer.codes
    offset = (8 - zero.float()) * scale.float()
    grids = torch.stack([scale.float(), offset], dim=-1).transpose(0, 1).contiguous().to(torch.bfloat16)
    group = layer.problem.group_size
    if layer.machine.where.type == "cuda":
        packed = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
        matmul = torch.ops.aten._weight_int4pack_mm
    else:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        matmul = torch.ops.aten._weight_int4pack_mm_for_cpu
    copies = layer.copies([packed, grids])
    return Products([lambda x, w=w, g=g: matmul(x, w, group, g) for w, g in copies], packed.nbytes + grids.nbytes)


def _gemlite(layer: Layer, config: Path | None) -> Products:
    """gemlite with what it tunes itself at first use (its setting `fast`), or with a table that it ships."""
    import gemlite  # pyright: ignore[reportMissingImports]
    from gemlite import core  # pyright: ignore[reportMissingImports]

    problem = layer.problem
    for kernel in core.GEMLITE_TRITON_MAPPING.values():  # what was tuned under the other setting
        for tuner in kernel.kernel:
            tuner.cache.clear()
    gemlite.reset_config()
    if config and not gemlite.load_config(str(config)):
        raise RuntimeError(f"gemlite cannot read its own {config}")
    codes, scale, zero = layer.codes
    dtype = gemlite.DType.BF16 if problem.dtype == "bfloat16" else gemlite.DType.FP16
    linear = gemlite.GemLiteLinear(
        problem.bits,
        group_size=problem.group_size,
        in_features=problem.K,
        out_features=problem.N,
        input_dtype=dtype,
        output_dtype=dtype,
    )
    linear.pack(codes, scale, zero.to(scale.dtype), None)
    tensors, settings = linear.get_tensor_args(), linear.get_meta_args()
    products = [
        lambda x, t=list(copy): gemlite.forward_functional(x, None, t, settings)
        for copy in layer.copies([tensor.detach() for tensor in tensors])
    ]
    return Products(products, sum(tensor.nbytes for tensor in tensors))


_PEERS: dict[str, Callable[[Layer], Products]] = {
    "cublas_bf16": lambda layer: _cublas(layer, torch.bfloat16),
    "cublas_fp16": lambda layer: _cublas(layer, torch.float16),
    "tinygemm": _tinygemm,
    "gemlite": lambda layer: _gemlite(layer, None),
    "gemlite_h100": lambda layer: _gemlite(layer, _gemlite_table()),
}
DTYPES = {"cublas_bf16": "bfloat16", "cublas_fp16": "float16", "tinygemm": "bfloat16"}
"""What a path computes in; the others take the problem's."""


def available() -> list[str]:
    """Peers that are here; gemlite cannot even be imported without a GPU."""
    peers = ["cublas_bf16", "cublas_fp16", "tinygemm"]
    if torch.cuda.is_available() and _gemlite_table():
        peers += ["gemlite_h100", "gemlite"]
    return peers


def applies(path: str, problem: Problem, plan: Plan) -> bool:
    """Whether a path is worth timing: its table must have the shape, the number of tokens must not be beyond reason."""
    if path == "gemlite_h100":
        table = _gemlite_table()
        return table is not None and f", {problem.N}, {problem.K}, {problem.group_size}," in table.read_text("utf-8")
    return path != "tinygemm" or plan.tinygemm_up_to >= problem.M


def _gemlite_table() -> Path | None:
    """The tiles gemlite ships for the chip nearest to an H200, if gemlite is installed."""
    package = importlib.util.find_spec("gemlite")
    return Path(package.origin).parent / "configs" / "h100.json" if package and package.origin else None


def compile_gemlite(problem: Problem) -> str | None:
    """Have gemlite try all it tries for a problem, so that Triton's cache has it. Returns what went wrong."""
    try:
        machine = the_machine(toy=False)
        layer = Layer(machine, replace(problem, M=1), 1)
        layer.products("gemlite").copies[0](random_tokens(problem, machine.where))
        machine.synchronize()
    except Exception as error:  # as text: not every exception finds its way between processes
        return f"{type(error).__name__}: {error}"[:200]
    return None


def ahead(session: Session, paths: Sequence[str]) -> Iterator[Task]:
    """gemlite compiles about twenty kernels for each shape and kind of size: side by side, before it is timed."""

    def work() -> None:
        plan, wanted = session.plan, []
        for M in (1, 16, 64):
            for shape in plan.shapes:
                if not session.results.has("time", ("gemlite", 4, plan.dtype, M, *shape)):
                    wanted.append(Problem(4, plan.group, True, plan.dtype, M, *shape))
        outcomes = list(pool.run(compile_gemlite, wanted, session.machine.workers, session.left() / 2))
        wrong = [str(outcome) for _, outcome in outcomes if outcome]
        if wrong:
            session.notes.append(f"gemlite: {len(wrong)} of {len(outcomes)} problems did not compile ahead: {wrong[0]}")

    if paths:
        yield Task("time", None, work, ours=False, seconds=60)
