import pytest
import torch
from tiny import save_tiny, tiny_model

from llmq.core.train_config import TrainConfig
from llmq.qat.plan import memory
from llmq.qat.request import open_request


@pytest.fixture
def opened(text, tmp_path):
    def open_it(model, **options):
        sizes = {"sequence_length": 32, "samples": 40, "batch": 4, "micro_batch": 2, "device": "cpu", "dry_run": True}
        config = TrainConfig(str(model), tmp_path / "out", (str(text),), **(sizes | options))
        return open_request(config, torch.device("cpu"))

    return open_it


def test_embeddings_that_also_predict_the_words_count_once(opened, tmp_path):
    request = opened(save_tiny(tmp_path / "tied", "qwen2"))
    parameters = dict(tiny_model("qwen2").named_parameters())  # torch lists tied ones once
    assert "lm_head.weight" not in parameters
    assert request.outside + sum(request.sizes.values()) == sum(p.numel() for p in parameters.values())


def test_memory_grows_with_what_learns_and_shrinks_with_checkpointing(opened, llama, packed):
    def parts(model, **options):
        request = opened(model, **options)
        return memory(request), sum(request.sizes.values()), request.outside

    (scales, count, outside), (codes, *_), (everything, *_) = (
        parts(llama, learn=w) for w in ("scales", "codes", "all")
    )
    assert scales["packed layers"] == count + count // 64 * 24
    assert codes["packed layers"] - scales["packed layers"] == 15 * count
    assert everything["other weights"] - codes["other weights"] == 12 * outside
    assert scales["original"] == 0 < codes["original"]
    assert parts(llama, checkpointing=True)[0]["activations"] < scales["activations"]
    adapters = parts(packed, lora=2, calibration_samples=20)[0]
    assert count < adapters["packed layers"] < codes["packed layers"]
