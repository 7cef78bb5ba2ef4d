"""How exactly products are computed, whatever the program around llmq has chosen."""

import pytest
import torch
from fake_gpu import GPU, FakeGpu
from small_runs import run

from llmq import pipeline
from llmq.core.device import bfloat16_products, full_float32, numbers


@pytest.fixture
def low_precision():
    """A program that lets matmuls round their factors, as a notebook may."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("low_precision")
def test_a_run_computes_in_full_float32_and_leaves_the_settings_as_they_were(llama, text_file, tmp_path, monkeypatch):
    seen, work = [], pipeline._plan_and_work

    def noted(request):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        work(request)

    monkeypatch.setattr(pipeline, "_plan_and_work", noted)
    changed = run(llama, text_file, tmp_path / "medium")
    assert seen == [("highest", False)]
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", True)
    torch.set_float32_matmul_precision("highest")
    usual = run(llama, text_file, tmp_path / "highest")
    assert (changed / "model.safetensors").read_bytes() == (usual / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("low_precision")
def test_settings_come_back_after_an_error():
    with pytest.raises(ValueError, match="inside"), full_float32(), bfloat16_products():
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "medium"


def test_numbers_of_a_gpu_are_read_together():
    with FakeGpu() as gpu:
        values = [torch.tensor(float(i)).to(GPU) for i in range(5)]
        assert numbers([*values, 2.5, 7]) == [0, 1, 2, 3, 4, 2.5, 7]
        assert len(gpu.waits) == 1
        assert numbers([3, 0.1]) == [3, 0.1]
        assert numbers([]) == []
        assert len(gpu.waits) == 1
