"""C functions take the place of recorded operators, and only where they compute the same."""

import pytest
import torch
from llmq_kernels.cpu_native import NativeLinear, NativeMatmul, NativeRmsNorm, library, rotate
from packed import pack
from tiny import tiny_model
from torch import nn

import llmq
from llmq.runtime import fusion
from llmq.runtime.decode_step import DecodeStep
from llmq.runtime.recording import compiled, record

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


def recorded_step(model):
    """The recording of a step after a prompt of five tokens, and its inputs."""
    step = DecodeStep(model.eval(), 1)
    step.prefill(torch.arange(5, 10)[None], None, 20)
    with torch.inference_mode():
        return record(step._through_model, step._inputs())[1], step._inputs()


def quick(recording):
    """The names of the C functions, in order."""
    calls = (call.quick for call in recording.calls if call.quick is not None)
    return [call.__name__ if call is rotate else type(call).__name__ for call in calls]


def test_a_step_of_a_packed_llama_is_mostly_c_functions(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(fusion, "_LARGE", 1)
    model = llmq.load(pack(llama, tmp_path / "packed"), "cpu", merge=True)
    recording, inputs = recorded_step(model)
    fused = fusion.fused(recording, {})
    kinds = quick(fused)
    assert kinds.count(NativeMatmul.__name__) == 2 * 4
    assert kinds.count(NativeRmsNorm.__name__) == 2 * 2 + 1
    assert kinds.count("rotate") == 2 * 2
    assert len(fused.calls) < 0.65 * len(recording.calls)
    torch.testing.assert_close(compiled(fused)(*inputs), compiled(recording)(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "qwen3", "phi3", "olmo2"])
def test_other_norms_and_rotations_are_recognized_or_left_as_they_are(name):
    recording, inputs = recorded_step(tiny_model(name))
    fused = fusion.fused(recording, {})
    assert NativeRmsNorm.__name__ in quick(fused)
    torch.testing.assert_close(compiled(fused)(*inputs), compiled(recording)(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x, w: w * (x * torch.rsqrt(x.pow(3).mean(-1, True) + 1e-5)),  # not the square
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(0, True) + 1e-5)),  # not over the last dimension
        lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, True) + 1e-5)),  # of another x
        lambda x, w: w * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, True) + 1e-5)),
        lambda x, w: w[:, None] * (x * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5)),
    ],
)
def test_what_is_almost_a_norm_stays_as_it_is(norm):
    x, w = torch.rand(6, 6), torch.randn(6)
    recording = record(lambda x: norm(x, w), (x,))[1]
    fused = fusion.fused(recording, {})
    assert quick(fused) == []
    assert torch.equal(compiled(fused)(x), norm(x, w))


def test_a_large_dense_matrix_is_read_in_16_bits_where_these_are_exact(monkeypatch):
    monkeypatch.setattr(fusion, "_LARGE", 64)
    exact, other = nn.Linear(8, 16).bfloat16().float(), nn.Linear(8, 16)
    dense: dict = {}
    x = torch.randn(2, 8)
    for layer, kinds in ((exact, [NativeLinear.__name__]), (other, [])):
        fused = fusion.fused(record(layer, (x,))[1], dense)
        assert quick(fused) == kinds
        torch.testing.assert_close(compiled(fused)(x), layer(x))
    assert len(dense) == 2
    again = fusion.fused(record(exact, (x,))[1], dense)
    assert again.calls[0].quick is dense[exact.weight.data_ptr()]  # one copy for all recordings


def test_without_the_library_nothing_is_replaced(monkeypatch):
    monkeypatch.setattr(fusion.cpu_native, "library", lambda: None)
    recording, _ = recorded_step(tiny_model("llama-gqa"))
    assert fusion.fused(recording, {}) is recording
