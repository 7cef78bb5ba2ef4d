"""Compile the kernels for GPUs that this machine does not have, and count things in the compiled programs.

The launching code of the kernels runs unchanged, on tensors without data. So the compiled program is the one that a
real call would launch. Triton's wheel contains ptxas and the disassembler. No CUDA toolkit is needed.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby, islice
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from disassembly import disassembled, instructions
from llmq_kernels import dequantize_matmul, packed_experts, packed_matmul
from llmq_kernels.choose import Device, Problem, Tile, shared_bytes
from llmq_kernels.experts import ExpertWeights
from llmq_kernels.layout import WIDTHS, PackedWeight, block_of, plane_of
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOP = 8
"""Experts that a token goes to."""
_TOGETHER = 32  # kernels that are disassembled at once
_POINTERS = {"torch.float16": "*fp16", "torch.bfloat16": "*bf16", "torch.float32": "*fp32"} | {
    "torch.int16": "*i16",
    "torch.int32": "*i32",
    "torch.int64": "*i64",
    "torch.uint8": "*u8",
}


@dataclass(frozen=True)
class Case:
    """One call to compile: packed_matmul if there is a tile, dequantize_rows if there is none.

    With experts: packed_experts, for problem.M tokens that go to TOP of them each.
    """

    device: Device
    problem: Problem
    tile: Tile | None
    bias: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Launch:
    """A kernel, the properties of its arguments that Triton compiles for, and the options of the compiler."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    """Names of the pointers and numbers that are multiples of 16."""
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """The compiled program of one case, in numbers. MMA, copies, loads and conversions count over the whole program."""

    kernel: str
    arch: int
    dtype: str
    bits: int
    group: int
    symmetric: bool
    even_k: bool
    bias: bool
    split: bool
    pdl: bool
    BM: int
    BN: int
    chunk: int
    warps: int
    stages: int
    per_weight: float
    """Instructions per weight and thread, in the loop over K. For dequantize_kernel: in the whole program."""
    registers: int
    spill: int
    stack: int
    shared: int
    estimate: int
    """Bytes of shared memory that choose.shared_bytes predicts."""
    i2f: int
    copies16: int
    """Asynchronous copies of 16 bytes to shared memory, LDGSTS.128 or UTMALDG."""
    stores16: int
    hmma: int
    hgmma: int
    serialized: bool
    """Whether ptxas waits after every wgmma instruction. It says so in its remarks C75xx."""
    local_in_loop: int


def launch_of(case: Case) -> Launch:
    """Return the launch that the launching code asks Triton for."""
    problem = case.problem
    if case.experts:
        return _launch_of_experts(case)
    x = torch.empty(problem.M, problem.K, dtype=getattr(torch, problem.dtype), device="meta")
    weight = _weight(problem)
    module = packed_matmul if case.tile else dequantize_matmul
    name = "packed_matmul_kernel" if case.tile else "dequantize_kernel"
    with mock.patch.object(module, "uses_asm", return_value=True), recorded(module, name) as launches:
        if case.tile:
            bias = x.new_empty(problem.N) if case.bias else None
            packed_matmul.packed_matmul(x, weight, bias, weight.grid.new_empty(4096), case.tile)
        else:
            dequantize_matmul.dequantize_rows(weight, x.new_empty(128, problem.K + -problem.K % 8)[:, : problem.K], 64)
    (launch,) = launches
    return launch


def _launch_of_experts(case: Case) -> Launch:
    problem, E = case.problem, case.experts
    assert case.tile is not None
    x = torch.empty(problem.M, problem.K, dtype=getattr(torch, problem.dtype), device="meta")
    index = torch.empty(problem.M, TOP, dtype=torch.int64, device="meta")
    one = _weight(problem)
    words = tuple(array.expand(E, -1, -1) for array in one.words)
    weights = ExpertWeights(words, one.grid.expand(E, -1, -1), one.bits, one.group_size, problem.K, one.symmetric)
    with (
        mock.patch.object(packed_experts, "uses_asm", return_value=True),
        recorded(packed_experts, "route_kernel"),
        recorded(packed_experts, "packed_experts_kernel") as launches,
    ):
        bias = x.new_empty(E, problem.N) if case.bias else None
        scores = x.new_empty(problem.M, TOP, dtype=torch.float32) if case.bias else None
        packed_experts.packed_experts(x, weights, index, bias, scores, one.grid.new_empty(4096), case.tile)
    return launches[0]


@contextlib.contextmanager
def recorded(module: ModuleType, name: str) -> Generator[list[Launch]]:
    """Record launches of this kernel of the module while the context is open. Nothing is launched."""
    kernel, recorder, launches = getattr(module, name), mock.MagicMock(), []
    recorder.__getitem__.return_value = lambda *args, **kwargs: launches.append(_specialized(kernel, args, kwargs))
    with mock.patch.object(module, name, recorder):
        yield launches


def _weight(problem: Problem) -> PackedWeight:
    plane = plane_of(problem.group_size, problem.K)
    padded = problem.blocks * block_of(problem.bits, plane)
    words = (torch.empty(problem.N, padded * w // 16, dtype=torch.int16, device="meta") for w in WIDTHS[problem.bits])
    grid = torch.empty(problem.K // problem.group_size, problem.N, dtype=torch.int32, device="meta")
    return PackedWeight(tuple(words), grid, problem.bits, problem.group_size, problem.K, problem.symmetric)


def _specialized(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Return the launch as Triton compiles it. Numbers that are 1 or a multiple of 16 give other code than the rest.

    Memory that torch allocates is always aligned to 16 bytes.
    """
    signature, constexprs, aligned = {}, {}, []
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    for param in kernel.params:
        value = values.pop(param.name)
        if isinstance(value, torch.Tensor):
            signature[param.name] = _POINTERS[str(value.dtype)]
            aligned.append(param.name)
        elif param.is_constexpr or (value == 1 and not param.do_not_specialize):
            signature[param.name], constexprs[param.name] = "constexpr", value
        else:
            signature[param.name] = "i32"
            if value % 16 == 0 and not param.do_not_specialize:
                aligned.append(param.name)
    sets = tuple(signature.items()), tuple(constexprs.items()), tuple(aligned), tuple(values.items())
    return Launch(kernel, *sets)


def compiled(launch: Launch, arch: int) -> tuple[Any, str]:
    """Compile a launch. Returns the compiled kernel and the log of ptxas."""
    names = launch.kernel.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, dict(launch.signature), dict(launch.constexprs), attrs)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # Triton prints the log of ptxas
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    return binary, log.getvalue()


def hot_loop(program: dict[int, str]) -> list[str]:
    """Return the loop over K: the longest loop that contains tensor-core instructions."""
    best: list[str] = []
    for end, text in program.items():
        jump = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < end:
            body = [line for address, line in program.items() if int(jump[1], 16) <= address <= end]
            if len(body) > len(best) and any("MMA" in line for line in body):
                best = body
    return best


def row_of(case: Case, launch: Launch, shared: int, log: str, sass: str) -> Row:
    const, options, program = dict(launch.constexprs), dict(launch.options), instructions(sass)
    body = hot_loop(program) if case.tile else list(program.values())
    chunk, warps = const.get("CHUNK", const["PLANE"]), options.get("num_warps", 4)
    weights = case.problem.planes * chunk * const["BN"] / (32 * warps)
    registers = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert registers, log
    assert stack, log

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    stages, BM = options.get("num_stages", 0), const.get("BM", 0)
    return Row(
        kernel=launch.kernel.fn.__name__.removesuffix("_kernel"), arch=case.device.arch, dtype=case.problem.dtype,
        bits=const["BITS"], group=const["GROUP"] or -1, symmetric=const["SYMMETRIC"], even_k=const["EVEN_K"],
        bias=const.get("HAS_BIAS", False), split=const.get("SPLIT", False), pdl=const.get("PDL", False),
        BM=BM, BN=const["BN"], chunk=chunk, warps=warps, stages=stages, per_weight=round(len(body) / weights, 2),
        registers=int(registers[1]), spill=int(stack[2]) + int(stack[3]), stack=int(stack[1]),
        shared=shared,
        estimate=shared_bytes(case.problem, BM, const["BN"], stages - 1, chunk, case.device.arch) if case.tile else 0,
        i2f=count(r"\bI2F"), copies16=count(r"LDGSTS\S*\.128|\bUTMALDG"),
        stores16=count(r"\bSTG\S*\.128"),
        hmma=count(r"\bHMMA"), hgmma=count(r"\bHGMMA"), serialized=bool(re.search(r"\(C75\d\d\)", log)),
        local_in_loop=sum("LDL" in line or "STL" in line for line in body),
    )  # fmt: skip


@contextlib.contextmanager
def uncached() -> Generator[None]:
    """Switch Triton's cache off while the context is open: a binary from the cache has no log."""
    with tempfile.TemporaryDirectory() as cache, knobs.compilation.scope(), knobs.nvidia.scope(), knobs.cache.scope():
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = cache
        yield


def inspect(cases: Iterable[Case], sass: Path | None = None) -> Iterator[Row]:
    """Compile the launches of all cases, equal ones only once.

    Args:
        sass: directory for the disassembled programs; None writes none.
    """
    with uncached():
        for arch, launches in groupby(_different(cases), lambda made: made[0].device.arch):
            while some := list(islice(launches, _TOGETHER)):
                binaries = [compiled(launch, arch) for _, launch in some]
                texts = disassembled([binary.asm["cubin"] for binary, _ in binaries], arch)
                for (case, launch), (binary, log), text in zip(some, binaries, texts, strict=True):
                    row = row_of(case, launch, binary.metadata.shared, log, text)
                    if sass:
                        values = (str(value) for value in list(asdict(row).values())[:14])
                        (sass / ("-".join(values) + ".sass")).write_text(text, encoding="utf-8")
                    yield row


def _different(cases: Iterable[Case]) -> Iterator[tuple[Case, Launch]]:
    """Yield each call with its launch, but for launches that came before."""
    seen = set()
    for case in cases:
        launch = launch_of(case)
        if (case.device.arch, launch) not in seen:
            seen.add((case.device.arch, launch))
            yield case, launch
