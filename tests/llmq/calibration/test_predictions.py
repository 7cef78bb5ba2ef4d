import pytest
import torch
from tiny import save_tiny

from llmq.calibration.block_runner import Compute
from llmq.calibration.block_stream import stream
from llmq.calibration.predictions import predictions
from llmq.calibration.texts import Tokens
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
