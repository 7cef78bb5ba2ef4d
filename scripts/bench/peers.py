"""Prepare a weight for every path that is timed: our kernels, the vendor's library, and kernels of other projects."""

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
    """Functions x -> x Wᵀ, one for each copy of the same weight, and the bytes of one copy."""

    copies: Sequence[Product]
    weight_bytes: int


class Layer:
    """A random weight in the layout of every path. A layout is made at its first use, and kept."""

    def __init__(self, machine: Machine, problem: Problem, rotation: float) -> None:
        self.machine, self.problem, self._rotation = machine, problem, rotation
        self._counters = new_counters(machine.where)
        self._made: dict[Any, Products] = {}

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (codes, scale, zero)."""
        return random_codes(self.problem, self.machine.where)

    @cached_property
    def _packed(self) -> list[Any]:
        return rotated(pack(*self.codes, self.problem.bits), self._rotation)

    def exact(self) -> Tensor:
        """Return the weight [N, K] in float64. It is large, so it is not kept."""
        return exact_weight(*self.codes)

    def fused(self, tile: Tile | None) -> Products:
        """Return the products of our kernels. With tile None, they dequantize first."""
        products = [lambda x, w=w: multiply(x, w, tile, self._counters) for w in self._packed]
        return Products(products, nbytes(self._packed[0]))

    def products(self, path: str) -> Products:
        """Return the products of a peer."""
        if path not in self._made:
            self._made[path] = _PEERS[path](self)
        return self._made[path]

    def copies(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return clones of the tensors of a layout: enough that one round through them reads `rotation` bytes."""
        count = max(2, math.ceil(self._rotation / sum(tensor.nbytes for tensor in tensors)))
        return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def _cublas(layer: Layer, dtype: torch.dtype) -> Products:
    W = layer.exact().to(dtype)
    return Products([lambda x, w=w: torch.mm(x, w.T) for (w,) in layer.copies([W])], W.nbytes)


def _tinygemm(layer: Layer) -> Products:
    """Return the products of torch's int4 kernel: w = (code - 8) * scale + offset, all in bfloat16."""
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
    """Return the products of gemlite, tuned by the table `config` that it ships or, without one, by itself (`fast`)."""
    import gemlite  # pyright: ignore[reportMissingImports]
    from gemlite import core  # pyright: ignore[reportMissingImports]

    problem = layer.problem
    for kernel in core.GEMLITE_TRITON_MAPPING.values():  # forget what was tuned with the other setting
        for tuner in kernel.kernel:
            tuner.cache.clear()
    gemlite.reset_config()
    if config and not gemlite.load_config(str(config)):
        raise RuntimeError(f"gemlite cannot read {config}, which it ships itself")
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
"""Dtype of the paths that have a fixed one. Other paths use the dtype of the problem."""


def available() -> list[str]:
    """Return the peers that this machine has. gemlite cannot even be imported without a GPU."""
    peers = ["cublas_bf16", "cublas_fp16", "tinygemm"]
    if torch.cuda.is_available() and _gemlite_table():
        peers += ["gemlite_h100", "gemlite"]
    return peers


def applies(path: str, problem: Problem, plan: Plan) -> bool:
    """Tell whether a path should be timed on a problem.

    gemlite's table must contain the shape. tinygemm is left out where it would take very long.
    """
    if path == "gemlite_h100":
        table = _gemlite_table()
        return table is not None and f", {problem.N}, {problem.K}, {problem.group_size}," in table.read_text("utf-8")
    return path != "tinygemm" or plan.tinygemm_up_to >= problem.M


def _gemlite_table() -> Path | None:
    """Return gemlite's own table of tiles for the chip most like an H200, or None if gemlite is not installed."""
    package = importlib.util.find_spec("gemlite")
    return Path(package.origin).parent / "configs" / "h100.json" if package and package.origin else None


def compile_gemlite(problem: Problem) -> str | None:
    """Let gemlite compile its tiles for a problem into Triton's cache. Returns the error as text, or None."""
    try:
        machine = the_machine(toy=False)
        layer = Layer(machine, replace(problem, M=1), 1)
        layer.products("gemlite").copies[0](random_tokens(problem, machine.where))
        machine.synchronize()
    except Exception as error:  # returned as text, because some exceptions cannot be sent between processes
        return f"{type(error).__name__}: {error}"[:200]
    return None


def ahead(session: Session, paths: Sequence[str]) -> Iterator[Task]:
    """Yield a task that lets gemlite compile in parallel before it is timed.

    It compiles about twenty kernels for each shape and each of three numbers of tokens.
    """

    def work() -> None:
        plan, to_do = session.plan, []
        for M in (1, 16, 64):
            for shape in plan.shapes:
                if not session.results.has("time", ("gemlite", 4, plan.dtype, M, *shape)):
                    to_do.append(Problem(4, plan.group, True, plan.dtype, M, *shape))
        outcomes = list(pool.run(compile_gemlite, to_do, session.machine.workers, session.left() / 2))
        wrong = [str(outcome) for _, outcome in outcomes if outcome]
        if wrong:
            session.notes.append(f"gemlite: {len(wrong)} of {len(outcomes)} problems did not compile: {wrong[0]}")

    if paths:
        yield Task("time", None, work, ours=False, seconds=60)
