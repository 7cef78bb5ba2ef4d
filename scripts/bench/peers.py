"""Prepare a weight for every path that is timed: our kernels, the vendor's library, and kernels of other projects."""

from __future__ import annotations

import copy
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
        self.machine, self.problem, self.rotation = machine, problem, rotation
        self._counters = new_counters(machine.where)
        self._made: dict[Any, Products] = {}

    @cached_property
    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (codes, scale, zero)."""
        return random_codes(self.problem, self.machine.where)

    @cached_property
    def _packed(self) -> list[Any]:
        return rotated(pack(*self.codes, self.problem.bits), self.rotation)

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
        count = max(2, math.ceil(self.rotation / sum(tensor.nbytes for tensor in tensors)))
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


def words_of(codes: Tensor) -> Tensor:
    """Pack 4-bit codes [N, K] into int32 [N, K / 8] as compressed-tensors does."""
    return torch.stack([codes[:, i::8].to(torch.int32) << 4 * i for i in range(8)]).sum(0, dtype=torch.int32)


def _humming(layer: Layer) -> Products:
    """Return the products of humming's kernels, on the same codes and scales, with the tiles that it chooses itself."""
    from humming.layer import HummingLayer  # pyright: ignore[reportMissingImports]

    problem, (codes, scale, _) = layer.problem, layer.codes
    weights = {"quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "num_bits": 4}
    weights |= {"strategy": "group", "symmetric": True, "group_size": problem.group_size}
    dtype = getattr(torch, problem.dtype)
    linear = HummingLayer(problem.N, problem.K, weights, torch_dtype=dtype).to(layer.machine.where)
    linear.load_from_tensors({"weight_packed": words_of(codes), "weight_scale": scale.to(dtype)})
    linear.transform()
    size = sum(parameter.nbytes for parameter in linear.parameters())
    count = max(2, math.ceil(layer.rotation / size))
    copies = [linear, *(copy.deepcopy(linear) for _ in range(count - 1))]
    return Products([lambda x, linear=linear: linear(x) for linear in copies], size)


_PEERS: dict[str, Callable[[Layer], Products]] = {
    "cublas_bf16": lambda layer: _cublas(layer, torch.bfloat16),
    "cublas_fp16": lambda layer: _cublas(layer, torch.float16),
    "tinygemm": _tinygemm,
    "humming": _humming,
    "gemlite": lambda layer: _gemlite(layer, None),
    "gemlite_h100": lambda layer: _gemlite(layer, _gemlite_table()),
}
DTYPES = {"cublas_bf16": "bfloat16", "cublas_fp16": "float16", "tinygemm": "bfloat16"}
"""Dtype of the paths that have a fixed one. Other paths use the dtype of the problem."""
_COMPILE_SECONDS = 10


def compiled() -> list[str]:
    """Return the peers that come compiled."""
    return ["cublas_bf16", "tinygemm"]


def compiling() -> list[str]:
    """Return the peers here that compile at their first call. They cannot even be imported without a GPU."""
    here = ["humming"] if importlib.util.find_spec("humming") else []
    here += ["gemlite_h100"] if _gemlite_table() else []
    return here if torch.cuda.is_available() else []


def tuning_themselves() -> list[str]:
    """Return the peers here that also try many tiles at their first call."""
    return ["gemlite"] if torch.cuda.is_available() and _gemlite_table() else []


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


class Job(NamedTuple):
    """Problems whose kernels of a peer one process compiles."""

    path: str
    problems: tuple[Problem, ...]


def compile_peer(job: Job) -> str | None:
    """Let a peer compile its kernels into its cache on disk. Returns the error as text, or None."""
    try:
        machine = the_machine(toy=False)
        for problem in job.problems:
            layer = Layer(machine, replace(problem, M=1), 1)
            layer.products(job.path).copies[0](random_tokens(problem, machine.where))
            machine.synchronize()
    except Exception as error:  # returned as text, because some exceptions cannot be sent between processes
        return f"{type(error).__name__}: {error}"[:200]
    return None


def ahead(session: Session, path: str, problems: Sequence[Problem]) -> Iterator[Task]:
    """Yield a task that lets a peer compile in parallel. Problems that are not done in time are not timed."""

    def work() -> None:
        session.cache["left out", path] = set(to_do)
        workers = session.machine.workers
        jobs = [Job(path, tuple(to_do[i::workers])) for i in range(min(workers, len(to_do)))]
        seconds = min(_COMPILE_SECONDS if path not in tuning_themselves() else 60, session.left())
        for job, outcome in pool.run(compile_peer, jobs, workers, seconds):
            if outcome is None:
                session.cache["left out", path] -= set(job.problems)
            else:
                session.notes.append(f"{path}: {len(job.problems)} problems are not compiled: {outcome}"[:200])

    done = session.results.has
    to_do = [p for p in problems if applies(path, p, session.plan) and not done("time", (path, *key_of(p)))]
    if to_do:
        yield Task("time", None, work, ours=False, seconds=5)


def key_of(problem: Problem) -> tuple[Any, ...]:
    """Return what tells the timings of one path apart."""
    return problem.bits, problem.dtype, problem.M, problem.N, problem.K
