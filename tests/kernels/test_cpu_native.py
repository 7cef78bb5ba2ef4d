"""Products on a CPU in C: float32 for every width, group and order of inputs, and torch where there is no compiler."""

import os
import subprocess
import sys

import pytest
import torch
from llmq_kernels import cpu_native, reference
from llmq_kernels.cpu_native import NativeLinear, NativeMatmul, NativeRmsNorm, library, narrowed, rotate
from oracle import relative_error, some_problem
from weights import BITS, shuffled_groups, some_weight

CPU = ("cpu", torch.float32)
TOKENS = (1, 2, 3, 4, 7, 8, 9, 40)  # all numbers of tokens that one pass takes, their sums, and dequantizing
needs_compiler = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


@needs_compiler
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("N", "K", "group"), [(33, 336, 16), (5, 352, 32), (101, 576, 64), (7, 512, 128), (3, 100, -1)]
)
def test_products_are_those_of_float64_up_to_float32_rounding(N, K, group, bits, symmetric):
    for tokens in TOKENS:
        x, weight, bias = some_problem(CPU, tokens, N, K, bits, group, symmetric)
        assert relative_error(NativeMatmul(weight, bias)(x), x, weight, bias) < 1e-6
        assert relative_error(NativeMatmul(weight)(x), x, weight) < 1e-6


@needs_compiler
def test_a_large_weight_is_shared_between_threads():
    x, weight, bias = some_problem(CPU, 5, 1027, 512)
    multiply = NativeMatmul(weight, bias)
    alone = multiply(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(multiply(x), alone)
    finally:
        torch.set_num_threads(1)
    assert relative_error(alone, x, weight, bias) < 1e-6


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 40])
def test_act_order_inputs_are_taken_as_they_come(tokens):
    weight, dense = some_weight(33, 96, 3, 4, False, group_of=shuffled_groups(96, 3))
    x = torch.randn(tokens, 96)
    torch.testing.assert_close(NativeMatmul(weight)(x).double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_many_tokens_give_the_bits_of_plain_torch(bits, symmetric):
    x, weight, bias = some_problem(CPU, 40, 101, 352, bits, 32, symmetric)
    assert torch.equal(NativeMatmul(weight, bias)(x), reference.matmul(x, weight, bias))


@needs_compiler
def test_leading_dimensions_strides_and_16_bit_inputs_are_taken():
    x, weight, bias = some_problem(CPU, 6, 33, 96)
    multiply = NativeMatmul(weight, bias)
    y = multiply(x)
    assert torch.equal(multiply(x.view(1, 2, 3, 96)), y.view(1, 2, 3, 33))
    assert torch.equal(multiply(x.T.contiguous().T), y)
    assert multiply(x[:0]).shape == (0, 33)
    half = multiply(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, multiply(x.bfloat16().float()).bfloat16())


@needs_compiler
@pytest.mark.parametrize("width", [95, 97, 192, 64])
def test_inputs_of_another_size_are_refused_like_by_torch(width):
    _, weight, bias = some_problem(CPU, 1, 12, 96)
    for tokens in (1, 3, 40):
        with pytest.raises(RuntimeError, match=rf"96 inputs cannot multiply x of shape \({tokens}, {width}\)"):
            NativeMatmul(weight, bias)(torch.randn(tokens, width))


@needs_compiler
def test_tensors_that_get_other_memory_and_biases_that_change_are_followed():
    x, weight, bias = some_problem(CPU, 2, 33, 96)
    half = bias.half()
    multiply = NativeMatmul(weight, half)
    multiply(x)
    _, other, _ = some_problem(CPU, 2, 33, 96, seed=5)
    weight.words[0].data = other.words[0].clone()
    weight.grid.set_(other.grid.clone())
    half.mul_(2)
    assert relative_error(multiply(x), x, other, half) < 1e-6


@needs_compiler
def test_groups_that_planes_straddle_and_float64_are_left_to_torch():
    for group, taken in ((112, False), (336, True), (16, True), (48, False)):
        x, weight, _ = some_problem(CPU, 2, 33, 336, group=group)
        assert cpu_native.supports(x, weight) is taken
        assert not cpu_native.supports(x.double(), weight)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_matrix_that_16_bits_hold_is_multiplied_in_float32(dtype):
    W, x, bias = torch.randn(50, 72).to(dtype).float(), torch.randn(3, 72), torch.randn(50)
    native = NativeLinear.of(W, bias)
    assert native is not None
    torch.testing.assert_close(native(x), torch.nn.functional.linear(x, W, bias), rtol=1e-5, atol=1e-5)
    sideways = NativeLinear.of(W.T.contiguous().T, bias)  # a view, as where the weight of a Conv1D is turned around
    assert sideways is not None
    assert torch.equal(sideways(x.T.contiguous().T), native(x))


def test_a_matrix_that_16_bits_would_change_is_left_alone():
    assert narrowed(torch.full((4, 8), 0.1)) is None
    assert narrowed(torch.full((4, 8), 65520.0)) is None  # beyond float16, between two bfloat16 numbers
    assert narrowed(torch.ones(4, 7)) is None  # rows of a length that the library does not take
    for value, dtype in ((1 + 2**-10, torch.float16), (2.0**100, torch.bfloat16)):
        half = narrowed(torch.full((4, 8), value))
        assert half is not None
        assert half.dtype == dtype


@needs_compiler
def test_norms_and_rotations_are_those_of_torch():
    x, weight = torch.randn(2, 3, 70), torch.randn(70)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight
    torch.testing.assert_close(NativeRmsNorm(weight, 1e-5)(x), expected)
    q, cos, sin = torch.randn(1, 3, 1, 16), torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    turned = torch.cat([-q[..., 8:], q[..., :8]], -1)
    torch.testing.assert_close(rotate(q, cos, sin), q * cos + turned * sin)


@pytest.fixture
def fresh_library():
    """`library` without what it remembers."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize("broken", ["no compiler", "switched off", "compiler fails", "home is a file"])
def test_where_it_cannot_be_built_there_is_no_library_and_no_error(broken, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    compiler = tmp_path / "bin" / "cc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home" if broken != "home is a file" else compiler))
    if broken in ("no compiler", "compiler fails"):
        monkeypatch.setenv("PATH", str(tmp_path / "home" if broken == "no compiler" else compiler.parent))
    monkeypatch.setenv("LLMQ_NATIVE", "0" if broken == "switched off" else "1")
    assert library() is None
    x, weight, _ = some_problem(CPU, 2, 33, 96)
    assert not cpu_native.supports(x, weight)
    assert not list((tmp_path / "home").rglob("*.so"))


@needs_compiler
def test_processes_that_build_it_at_the_same_time_each_get_a_whole_library(tmp_path):
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = "from llmq_kernels.cpu_native import library; assert library() is not None"
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.suffix for path in (tmp_path / ".cache" / "llmq" / "native").iterdir()] == [".so"]
