import pytest
import torch
from architectures import tiny_models
from tiny import save_tiny

from llmq.calibration.block_runner import Compute
from llmq.calibration.block_stream import stream
from llmq.calibration.predictions import predictions, some_tokens, token_dim
from llmq.calibration.texts import Tokens
from llmq.core.errors import RequestError
from llmq.core.timing import Clock
from llmq.models.model_source import ModelSource

CPU = Compute(torch.device("cpu"))


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2", "gemma2", "granite", "gpt2", "phi3"])  # qwen2: tied
@torch.no_grad()
def test_they_are_those_of_the_whole_model(kind, tmp_path):
    source = ModelSource(str(save_tiny(tmp_path, kind, torch.float32)))
    ids = torch.randint(3, 384, (2, 16), generator=torch.Generator().manual_seed(1))
    for block in stream(source, Tokens(ids, ids[:0]), CPU, Clock()):
        last = block.run_batch(0)
    with predictions(source, ids[:1], CPU) as predict:
        whole, some = predict(last), predict(last[:, 3::4])
    assert all(tensor.device.type == "meta" for tensor in source.skeleton.state_dict().values())
    expected = ModelSource(str(tmp_path)).load_all(torch.device("cpu"), torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(some, expected[:, 3::4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3n_text", "llama4_text", "qwen3_5_text"])  # the first: four streams for a token
@torch.no_grad()
def test_of_some_tokens_they_are_the_same_in_any_layout(kind, tmp_path):
    tiny_models.save_tiny(kind, tmp_path)
    source, ids = ModelSource(str(tmp_path)), torch.randint(3, 99, (2, 16), generator=torch.Generator().manual_seed(1))
    for block in stream(source, Tokens(ids, ids[:0]), CPU, Clock()):
        last = block.run_batch(0)
    with predictions(source, ids[:1], CPU) as predict:
        whole, some = predict(last), predict(some_tokens(last, block.batch_dim, 3))
    assert some.shape[:2] == (2, 5)
    torch.testing.assert_close(some, whole[:, 2::3], rtol=1e-4, atol=1e-4)


def test_tokens_are_found_whatever_comes_first():
    hidden = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(some_tokens(hidden, 0, 2), hidden[:, 1::2])
    assert torch.equal(some_tokens(hidden, 1, 2), hidden[1::2])
    assert token_dim(torch.zeros(4, 2, 16, 8), 1) == 2


@torch.no_grad()
def test_they_are_in_float32_on_a_cpu_whatever_blocks_multiply_in(llama):
    source, ids = ModelSource(str(llama)), torch.arange(3, 19)[None]
    compute = Compute(torch.device("cpu"), precision=torch.bfloat16)
    for block in stream(source, Tokens(ids, ids[:0]), compute, Clock()):
        last = block.run_batch(0)
    with predictions(source, ids, compute) as predict:
        exact = predict(last)
    with predictions(source, ids, CPU) as predict:
        assert torch.equal(predict(last), exact)


def test_a_model_that_predicts_nothing_without_its_blocks_is_refused(llama, monkeypatch):
    source, ids = ModelSource(str(llama)), torch.arange(3, 19)[None]

    def fails(*_, **__):
        raise ValueError("mat1 and mat2")

    monkeypatch.setattr(type(source.skeleton), "forward", fails)
    refused = pytest.raises(RequestError, match=r"without its blocks \(ValueError: mat1 and mat2\), so use --bits")
    with refused, predictions(source, ids, CPU):
        pass
    assert all(tensor.device.type == "meta" for tensor in source.skeleton.state_dict().values())
