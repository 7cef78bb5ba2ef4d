"""Models whose blocks are called in other ways than Llama's are quantized, and run."""

from __future__ import annotations

import pytest
import torch
from other_models import save_other
from packed import logits, put_dequantized
from small_runs import run
from torch import nn

import llmq
from llmq.calibration.block_runner import Block, Compute
from llmq.calibration.input_statistics import collect_statistics
from llmq.core.timing import Clock
from llmq.models.block_structure import find_groups

IDS = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["bloom", "codegen", "falcon-7b", "falcon-40b", "gpt_neo", "gptj", "mpt", "xglm"])
def test_it_is_quantized_and_runs(name, text_file, tmp_path):
    model = save_other(tmp_path / "source", name)
    output = run(tmp_path / "source", text_file, tmp_path / "packed", bits=8)
    expected = logits(model, IDS)
    assert (logits(llmq.load(output, "cpu"), IDS) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", ["gemma4", "gemma4-shared", "lfm2"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_runs_is_what_was_computed(name, method, text_file, tmp_path):
    model = save_other(tmp_path / "source", name)
    output = run(tmp_path / "source", text_file, tmp_path / "packed", method=method, effort="fast")
    assert torch.equal(logits(llmq.load(output, "cpu"), IDS), logits(put_dequantized(model, output), IDS))


class Routed(nn.Module):
    """Tokens with a positive first feature go to one expert, the others to another."""

    def __init__(self):
        super().__init__()
        self.router = Router(64, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x):
        self.router(x)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (x[..., 0] > 0) == (i == 0)
            if chosen.any():
                y[chosen] = expert(x[chosen])
        return x + y


class Router(nn.Linear):
    def forward(self, x):
        return super().forward(x), x.argmax(-1)


@torch.no_grad()
def test_an_expert_that_a_micro_batch_does_not_reach_has_the_statistics_of_the_others():
    torch.manual_seed(0)
    hidden = [torch.randn(2, 8, 64) for _ in range(4)]
    hidden[1][..., 0] = 1.0  # all to the first expert
    hidden[2][..., 0] = -1.0  # all to the second one
    block = Block("block", Routed(), [*hidden, hidden[0]], 4, ((), {}), Compute(torch.device("cpu")))
    groups = find_groups(block.module, block.run, hidden[0])
    assert [group.linears for group in groups] == [("experts.0",), ("experts.1",)]
    block.original = [x + 0.1 for x in block.hidden]  # some of its tokens go to the other expert
    text = torch.cat([x.flatten(0, 1) for x in hidden])
    is_first = text[:, 0] > 0
    for statistics, mine in zip(collect_statistics(block, groups, Clock()), (is_first, ~is_first), strict=True):
        assert statistics.tokens == int(mine.sum())
        torch.testing.assert_close(statistics.H, text[mine].T @ text[mine] / mine.sum(), rtol=1e-4, atol=1e-5)
