"""Blocks come one at a time, with the hidden states of the model quantized so far."""

import pytest
import torch
from tiny import save_tiny, tiny_model

from llmq.calibration.block_runner import Compute
from llmq.calibration.block_stream import stream
from llmq.calibration.texts import Tokens
from llmq.core.timing import Clock
from llmq.models.model_source import ModelSource

CPU = Compute(torch.device("cpu"))


def tokens(samples=5, length=24):
    ids = torch.randint(2, 300, (samples, length), generator=torch.Generator().manual_seed(0))
    return Tokens(ids[:-1], ids[-1:])


def coarsely_rounded(block):
    """Stands for any quantization: changes every weight a lot, the same way each time."""
    for parameter in block.parameters():
        if parameter.ndim == 2:
            parameter.data = (parameter.data * 8).round() / 8


def inputs_of_block(model, index, ids):
    seen = []
    handle = model.model.layers[index].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids, use_cache=False)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "gemma3", "phi3", "qwen2", "olmo2"])
@torch.no_grad()
def test_each_block_sees_what_it_sees_in_the_model_quantized_so_far(name, tmp_path):
    source = ModelSource(str(save_tiny(tmp_path, name, num_hidden_layers=3)))
    whole = tiny_model(name, num_hidden_layers=3)
    ids = tokens()
    for i, block in enumerate(stream(source, ids, CPU, Clock())):
        for batch, hidden in zip((ids.train, ids.held_out), block.hidden, strict=True):
            assert torch.equal(hidden, inputs_of_block(whole, i, batch))
        coarsely_rounded(block.module)
        coarsely_rounded(whole.model.layers[i])
    assert i == 2


@torch.no_grad()
def test_blocks_get_their_own_arguments(tmp_path):
    # Gemma-2 alternates sliding and full attention: with 24 tokens and a window of 8 the masks differ.
    source = ModelSource(str(save_tiny(tmp_path, "gemma2", num_hidden_layers=3)))
    masks = [b.arguments[1]["attention_mask"] for b in stream(source, tokens(), CPU, Clock())]
    assert masks[0] is not None
    assert masks[1] is None or not torch.equal(masks[0].of(2), masks[1].of(2))
    assert torch.equal(masks[0].of(2), masks[2].of(2))


@torch.no_grad()
def test_only_one_block_is_in_memory_at_a_time(llama):
    source = ModelSource(str(llama))
    for block in stream(source, tokens(), CPU, Clock()):
        real = {name for name, p in source.skeleton.named_parameters() if p.device.type != "meta"}
        assert real == set(source.block_tensor_names(block.name))
    assert all(p.device.type == "meta" for p in source.skeleton.parameters())


def test_held_out_samples_are_micro_batches_of_their_own(llama):
    source = ModelSource(str(llama))
    many = Tokens(torch.full((11, 200), 5), torch.full((3, 200), 6))
    block = next(stream(source, many, CPU, Clock()))
    assert [len(h) for h in block.hidden] == [5, 5, 1, 3]
    assert block.held_out_from == 3
