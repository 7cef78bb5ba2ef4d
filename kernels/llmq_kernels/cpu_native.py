"""Products with packed weights on a CPU, in C: cpu_*.c, built with the machine's compiler when first needed.

Sums are float32, as if the weight had been dequantized. All widths and groups are taken. The library is kept in
~/.cache/llmq/native. Where there is no C compiler, `library` returns None, and callers use torch instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llmq_kernels.layout import PackedWeight

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("cpu_native.c", "cpu_dense.c", "cpu_lanes.h"))
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
_BUILD_SECONDS = 120
# With more tokens it is faster to dequantize a slice of rows and to multiply with torch's float32 matmul (2-core AVX2
# machine, one thread, 2026-11-28, 3072x576: 0.97 against 0.96 ms at 8 tokens, 1.66 against 1.36 at 16).
FEW_TOKENS = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLICE = 1 << 20  # weights dequantized at a time: they stay in the cache


class _Weight(ctypes.Structure):
    """`Weight` of cpu_native.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("words", "top", "grid", "permutation")),
        *((name, ctypes.c_int64) for name in ("N", "K", "group", "plane")),
        *((name, ctypes.c_int32) for name in ("bits", "symmetric")),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it cannot be built here."""
    if os.environ.get("LLMQ_NATIVE") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        return None
    # Other source, compiler or processor: another library. Home directories are shared between machines.
    text = "".join(source.read_text() for source in _SOURCES)
    parts = (text, compiler, str(os.stat(compiler).st_mtime), " ".join(_FLAGS), _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16] + ".so"
    path = Path.home() / ".cache" / "llmq" / "native" / name
    try:
        if not path.is_file():
            _build(compiler, path)
        return _declared(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _build(compiler: str, path: Path) -> None:
    """Compile into a file beside the path, then rename it: another process may build it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        out = Path(folder) / "out.so"
        for threads in (["-fopenmp"], []):  # clang on a Mac has no OpenMP
            command = [compiler, *_FLAGS, *threads, *map(str, _SOURCES[:2]), "-o", str(out), "-lm"]
            done = subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, check=False)
            if done.returncode == 0:
                os.replace(out, path)
                return
    raise OSError(f"{compiler} cannot build {_SOURCES[0].name}")


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, kind, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    lib.llmq_matmul.argtypes = (pointer, pointer, pointer, pointer, size)
    lib.llmq_dequantize.argtypes = (pointer, size, size, pointer)
    lib.llmq_linear_16.argtypes = (pointer, kind, pointer, pointer, pointer, size, size, size)
    lib.llmq_rms_norm.argtypes = (pointer, pointer, real, pointer, size, size)
    lib.llmq_rotate.argtypes = (pointer, pointer, pointer, pointer, size, size)
    for name in ("dequantize", "linear_16", "rms_norm", "rotate"):
        getattr(lib, f"llmq_{name}").restype = None
    return lib


def supports(x: Tensor, weight: PackedWeight) -> bool:
    """Tell if a product can be computed here: on a CPU, in float32 or less, with groups of whole planes."""
    whole = weight.group_size % weight.plane == 0 or weight.group_size == weight.in_features
    return x.is_cpu and x.dtype in _DTYPES and whole and library() is not None


class NativeMatmul:
    """x @ Wᵀ + bias in float32 for one weight; `supports` must hold. Pointers follow where tensors are given others."""

    def __init__(self, weight: PackedWeight, bias: Tensor | None = None) -> None:
        lib = library()
        assert lib is not None
        self.bias = None if bias is None else bias.detach()
        self._packed = weight  # its tensors must live as long as the pointers
        self._few: Callable[..., int] = lib.llmq_matmul
        self._dequantize: Callable[..., None] = lib.llmq_dequantize
        self._N, self._K, self._permutation = weight.out_features, weight.in_features, weight.permutation
        self._point()

    def _point(self) -> None:
        weight = self._packed
        words = [array.data_ptr() for array in weight.words]
        permutation = None if weight.permutation is None else weight.permutation.data_ptr()
        sizes = weight.out_features, weight.in_features, weight.group_size, weight.plane
        grid = weight.grid.data_ptr()
        self._weight = _Weight(words[0], words[-1], grid, permutation, *sizes, weight.bits, int(weight.symmetric))
        self._address, self._pointers = ctypes.addressof(self._weight), (words[0], words[-1], grid)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [*batch, N] for x [*batch, K], in the dtype of x. Raises RuntimeError, like torch, for another K."""
        if x.dtype is not torch.float32:
            return self(x.to(torch.float32)).to(x.dtype)
        if x.shape[-1] != self._K:
            raise RuntimeError(f"a linear of {self._K} inputs cannot multiply x of shape {tuple(x.shape)}")
        words = self._packed.words
        if self._pointers != (words[0].data_ptr(), words[-1].data_ptr(), self._packed.grid.data_ptr()):
            self._point()  # `tensor.data = other` gives a tensor other memory
        tokens = x.numel() // self._K
        if tokens > FEW_TOKENS:
            return self._many(x)
        x, bias = x.contiguous(), self.bias
        if bias is not None and (bias.dtype is not torch.float32 or not bias.is_contiguous()):
            bias = bias.to(torch.float32).contiguous()
        y = x.new_empty((*x.shape[:-1], self._N))
        added = None if bias is None else bias.data_ptr()
        if self._few(self._address, x.data_ptr(), added, y.data_ptr(), tokens):
            raise MemoryError("no memory for the tokens of a matmul")
        return y

    def _many(self, x: Tensor) -> Tensor:
        if self._permutation is not None:
            x = x.index_select(-1, self._permutation)
        rows = max(1, _SLICE // self._K)
        W = x.new_empty(min(rows, self._N), self._K)
        flat, y = x.reshape(-1, self._K), x.new_empty(*x.shape[:-1], self._N)
        parts = y.view(-1, self._N)
        for start in range(0, self._N, rows):
            stop = min(start + rows, self._N)
            self._dequantize(self._address, start, stop, W.data_ptr())
            torch.mm(flat, W[: stop - start].t(), out=parts[:, start:stop])
        return y if self.bias is None else y.add_(self.bias)


class NativeLinear:
    """x @ Wᵀ + bias in float32, for a dense W [N, K] in 16 bits."""

    def __init__(self, half: Tensor, bias: Tensor | None = None) -> None:
        lib = library()
        assert lib is not None
        self._half, self._bias = half, None if bias is None else bias.detach().to(torch.float32).contiguous()
        self._before = half.data_ptr(), int(half.dtype == torch.bfloat16)
        self._bias_address = None if self._bias is None else self._bias.data_ptr()
        self._linear: Callable[..., None] = lib.llmq_linear_16
        self._N, self._K = half.shape

    @classmethod
    def of(cls, W: Tensor, bias: Tensor | None = None) -> NativeLinear | None:
        """Return the products with a float32 matrix, or None if 16 bits would change its numbers."""
        half = narrowed(W)
        return None if half is None else cls(half, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Return [*batch, N] for x [*batch, K], both float32."""
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._N))
        addresses = x.data_ptr(), self._bias_address, y.data_ptr()
        self._linear(*self._before, *addresses, self._N, self._K, x.numel() // self._K)
        return y


def narrowed(W: Tensor) -> Tensor | None:
    """Return a matrix in float16 or bfloat16 if that changes no number of it and the library takes it, else None."""
    if W.dtype != torch.float32 or not W.is_cpu or W.shape[1] % 8:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        rows = (part.to(dtype).to(torch.float32).equal(part) for part in W.split(1024))  # most end at the first rows
        if all(rows):
            return W.to(dtype).contiguous()
    return None


class NativeRmsNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in float32."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        lib = library()
        assert lib is not None
        self._weight, self._eps, self._norm = weight.detach().contiguous(), eps, lib.llmq_rms_norm
        self._address, self._K = self._weight.data_ptr(), weight.numel()

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        y = torch.empty_like(x)
        self._norm(x.data_ptr(), self._address, self._eps, y.data_ptr(), x.numel() // self._K, self._K)
        return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x rotated to its position: x [1, heads, 1, d], cos and sin [..., d], all float32, the library present."""
    lib = library()
    assert lib is not None
    y = torch.empty_like(x)
    size = x.shape[-1]
    lib.llmq_rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), x.numel() // size, size)
    return y
