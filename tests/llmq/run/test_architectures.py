"""Models whose blocks are called in other ways: tuples come back, masks and biases grow with the batch."""

from __future__ import annotations

import pytest
import torch
from packed import dequantized_model, logits, some_tokens
from small_runs import run
from tiny import tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.calibration.block_runner import Block, Compute, PerSequence
from llmq.calibration.input_statistics import collect_statistics
from llmq.core.timing import Clock
from llmq.models.block_structure import find_groups
from llmq.runtime.packed_linear import PackedLinear

_TOKENS = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96}
ARCHITECTURES = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "codegen": _GPT | {"rotary_dim": 8, "n_ctx": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_h1": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}
    | {"mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    | {"max_position_embeddings": 256},
    "gptj": _GPT | {"rotary_dim": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 256},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_quantized_and_runs(name, text_file, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(_TOKENS | ARCHITECTURES[name]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in parameter_name:
                parameter *= 3
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    output = run(tmp_path / "source", text_file, tmp_path / "packed", bits=8)
    ids = torch.randint(2, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = logits(model, ids)
    assert (logits(llmq.load(output, "cpu"), ids) - expected).norm() < 0.02 * expected.norm()


def test_mamba_reads_a_weight_without_a_call_and_runs(text_file, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", **_TOKENS, hidden_size=64, state_size=16, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    output = run(tmp_path / "source", text_file, tmp_path / "packed")
    model, ids = llmq.load(output, "cpu"), some_tokens()
    mixer = model.backbone.layers[0].mixer
    assert (type(mixer.in_proj), type(mixer.dt_proj)) == (PackedLinear, nn.Linear)
    expected = logits(dequantized_model(tmp_path / "source", output), ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "of_three"), [((1, 1, 5, 5), (3, 1, 5, 5)), ((4, 1, 5), (12, 1, 5))])
def test_an_argument_of_one_sequence_is_made_that_of_several(shape, of_three):
    one = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = PerSequence(one).of(3)
    assert made.shape == of_three
    assert all(torch.equal(part, one) for part in made.chunk(3))


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
