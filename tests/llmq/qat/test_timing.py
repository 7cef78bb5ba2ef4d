import pytest
import torch
from tiny import some_text

from llmq.core.train_config import TrainConfig
from llmq.qat import timing
from llmq.qat.request import open_request

BLOCKS = 2
LINEARS = 7 * BLOCKS


@pytest.fixture
def estimate(llama, tmp_path, monkeypatch):
    """The estimate of a training if each part takes a second forwards and a second backwards."""
    (tmp_path / "t.txt").write_text(some_text())

    def timed(work, compute):
        with torch.enable_grad():
            made = work()
        return 1.0 if isinstance(made, torch.Tensor) else 2.0

    monkeypatch.setattr(timing, "_timed", timed)
    monkeypatch.setattr(timing, "_optimizer", lambda request: 0.0)

    def seconds(**options):
        sizes = {"sequence_length": 32, "samples": 40, "batch": 4, "micro_batch": 2, "device": "cpu", "dry_run": True}
        sizes |= {"steps": 10, "checks": 2}
        config = TrainConfig(str(llama), tmp_path / "out", (str(tmp_path / "t.txt"),), **(sizes | options))
        return timing.seconds(open_request(config, torch.device("cpu")))

    return seconds


def test_each_linear_the_attention_and_the_head_count_as_often_as_they_run(estimate):
    forward, head = LINEARS + BLOCKS, 1
    measured = 3 * 2 * (forward + head)  # at the start and twice more, two micro-batches held out
    assert estimate() == 10 * 2 * (2 * forward + 3 * head) + measured
    assert estimate(steps=20) == 20 * 2 * (2 * forward + 3 * head) + measured


def test_the_original_and_checkpointing_cost_a_forward_pass_more(estimate):
    forward, head = LINEARS + BLOCKS, 1
    assert estimate(checkpointing=True) - estimate() == 10 * 2 * forward
    assert estimate(loss="kl") - estimate() == (10 * 2 + 3 * 2) * (forward + head)


def test_the_optimizer_steps_what_learns(llama, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text(some_text())
    monkeypatch.setattr(timing, "_timed", lambda work, compute: 1.0)

    def steps(learn):
        config = TrainConfig(
            str(llama), tmp_path / "out", (str(tmp_path / "t.txt"),), learn=learn, sequence_length=32, samples=40
        )
        request = open_request(config, torch.device("cpu"))
        return timing._optimizer(request) * timing._SOME, sum(request.sizes.values())

    (scales, packed), (codes, _), (everything, _) = map(steps, ("scales", "codes", "all"))
    assert scales == packed // 64
    assert codes - scales == packed
    assert everything > codes
