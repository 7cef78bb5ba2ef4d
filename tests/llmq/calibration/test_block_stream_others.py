"""What leaves the last block of the stream is what leaves it in the whole model, whatever its blocks are given."""

import copy

import pytest
import torch
from architectures.tiny_models import save_tiny, tiny_model
from torch import nn

from llmq.calibration import work_split
from llmq.calibration.block_arguments import PerBatch, Shared
from llmq.calibration.block_runner import Compute
from llmq.calibration.block_stream import StreamSettings, stream
from llmq.calibration.hidden_states import HiddenDir
from llmq.calibration.input_statistics import collect_statistics
from llmq.calibration.texts import Tokens
from llmq.core.timing import Clock
from llmq.models.block_structure import Group, find_groups
from llmq.models.model_source import ModelSource

CPU = Compute(torch.device("cpu"))
KINDS = {
    "blocks return a tuple": "bloom codegen cpmant falcon falcon@40b falcon_h1 gpt_neo gpt_neox_japanese gptj mpt rwkv"
    " xlstm",
    "masks and biases grow with the batch": "xglm",
    "blocks of several kinds": "bamba granitemoehybrid@dense jamba@dense lfm2 mamba2 qwen3_5_text recurrent_gemma",
    "arguments depend on the tokens": "gemma4_text zamba2",
    "blocks read keys and values of earlier ones": "gemma4_text@shared gemma3n_text",
    "modules that are made for an encoder": "bart bert",
}


@pytest.fixture(autouse=True)
def _small_micro_batches(monkeypatch):
    monkeypatch.setattr(work_split, "_TOKENS_PER_RUN", 48)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the directory of a model of this name; each is made once."""
    made = {}

    def directory(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            save_tiny(name, made[name])
        return made[name]

    return directory


def tokens():
    ids = torch.randint(2, 300, (6, 24), generator=torch.Generator().manual_seed(0))
    return Tokens(ids[:3], ids[3:])


def rounded(W):
    """Stands for any quantization: changes weights a lot, the same way each time."""
    return (W * 4).round() / 4


def quantize(block):
    """Replaces the weights of the block as a sequential method does: it runs before each group is replaced."""
    if block.batch_dim:  # find_groups takes the usual hidden states only
        groups = [Group((name,)) for name, m in block.module.named_modules() if isinstance(m, nn.Linear)]
    else:
        groups = [group for group in find_groups(block.module, block.run, block.sample) if not group.is_read]
    block.expect([[group] for group in groups])
    for group in groups:
        collect_statistics(block, [group], Clock(), last=group is groups[-1])
        for name in group.linears:
            block.replace_weight(name, rounded(block.module.get_submodule(name).weight.data))
    return {name for group in groups for name in group.linears}


def leaving_last(model, name, ids):
    """What leaves the block of this name when the whole model runs."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda *args: seen.append(args[-1]))
    model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


def streamed(source, whole, hidden_dir=None):
    """Quantizes the blocks of the stream, and of the whole model alike; returns what leaves the last block in both."""
    settings = StreamSettings(keep_original=True, hidden_dir=hidden_dir)
    for block in stream(source, tokens(), CPU, Clock(), settings):
        for name in quantize(block):
            linear = whole.get_submodule(f"{block.name}.{name}")
            linear.weight.data = rounded(linear.weight.data)
        if block.name == source.block_names[-1]:
            return [block.run_batch(i) for i in range(len(block.hidden))], list(block.original)
    raise AssertionError


@pytest.mark.parametrize("name", " ".join(KINDS.values()).split())
@torch.no_grad()
def test_what_leaves_the_last_block_is_what_leaves_it_in_the_whole_model(name, saved):
    source, original = ModelSource(str(saved(name))), tiny_model(name)
    whole, last = copy.deepcopy(original), source.block_names[-1]
    outputs, originals = streamed(source, whole)
    batches = [*tokens().train.split(2), *tokens().held_out.split(2)]
    assert len(outputs) == len(batches) == 4
    for batch, output, output_o in zip(batches, outputs, originals, strict=True):
        assert torch.equal(output, leaving_last(whole, last, batch))
        assert torch.equal(output_o, leaving_last(original, last, batch))
        assert (output - output_o).norm() > 0.05 * output_o.norm()


@pytest.mark.parametrize("name", ["gemma4_text@shared", "gemma3n_text", "zamba2"])
@torch.no_grad()
def test_on_disk_they_are_the_same(name, saved, tmp_path):
    source = ModelSource(str(saved(name)))
    in_memory = streamed(source, tiny_model(name))
    on_disk = streamed(source, tiny_model(name), HiddenDir(tmp_path, "run"))
    for one, other in zip(in_memory, on_disk, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert list(tmp_path.glob("run-argument0-*.states"))
    assert bool(list(tmp_path.glob("run-shared-*.states"))) == (name != "zamba2")


@torch.no_grad()
def test_each_micro_batch_and_each_block_has_arguments_of_its_own(saved):
    source, values = ModelSource(str(saved("gemma4_text"))), []
    for block in stream(source, tokens(), CPU, Clock()):
        (argument,) = (a for a in block.arguments[0] if isinstance(a, PerBatch))
        assert [len(argument.values[i]) for i in range(4)] == [2, 1, 2, 1]
        values += [argument.values[i][:1] for i in range(4)]
    assert len(values) == 8
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@torch.no_grad()
def test_an_argument_that_all_blocks_get_is_kept_once(saved):
    blocks = stream(ModelSource(str(saved("zamba2"))), tokens(), CPU, Clock())
    first, *others = ([a for a in block.arguments[0] if isinstance(a, PerBatch)] for block in blocks)
    assert (len(first), len(others)) == (1, 2)
    assert all(other[0] is first[0] for other in others)


@torch.no_grad()
def test_a_block_that_runs_again_gets_what_entered_it_and_only_its_last_run_counts(saved):
    for i, block in enumerate(stream(ModelSource(str(saved("gemma4_text@shared"))), tokens(), CPU, Clock())):
        assert isinstance(block.arguments[1]["shared_kv_states"], Shared)
        if i == 1:
            before = block.shared.entering((0, False), CPU.device).containers
            block.run_batch(0)
            again = block.shared.entering((0, False), CPU.device).containers
            assert str(before) == str(again)
            block.run_batch(0, leave=True)
            (after,) = block.shared.entering((0, False), CPU.device).containers.values()
            assert after.keys() == {"sliding_attention", "full_attention"}
            (other,) = block.shared.entering((1, False), CPU.device).containers.values()
            assert other.keys() == {"sliding_attention"}  # the block has not left micro-batch 1 yet
