"""What a model gives to its blocks is found out without running them; what cannot be replayed is refused."""

import pytest
import torch
from torch import nn

from llmq.calibration.block_arguments import Carried, PerBatch, PerSequence, Shared
from llmq.calibration.block_recorder import recorded
from llmq.calibration.block_runner import Compute
from llmq.core.errors import RequestError
from llmq.models.model_source import ModelSource

CPU = Compute(torch.device("cpu"))


def recording_of(directory, forward, ids=None):
    """Record a Llama whose blocks are called by `forward(embeddings, blocks)`."""
    source = ModelSource(str(directory))

    class Decoder(nn.Module):
        def __init__(self, decoder):
            super().__init__()
            self.inner = decoder

        def forward(self, input_ids, use_cache):
            assert not use_cache
            return forward(self.inner.embed_tokens(input_ids), list(self.inner.layers))

    source.skeleton.get_decoder = lambda decoder=source.skeleton.model: Decoder(decoder)
    ids = torch.arange(8)[None] if ids is None else ids
    with recorded(source, ids, CPU) as recording:
        return recording


def last_only(hidden, blocks):
    return blocks[-1](hidden)


def twice(hidden, blocks):
    for block in [*blocks, *blocks]:
        hidden = block(hidden)
    return hidden


def scaled_between(hidden, blocks):
    for block in blocks:
        hidden = block(hidden / 2)
    return hidden


def with_former_inputs(hidden, blocks):
    first = hidden
    for block in blocks:
        hidden, first = block(hidden, residual=first), hidden
    return hidden


def failing(hidden, blocks):
    raise KeyError("no kernel\nfor this")


def with_a_number(hidden, blocks):
    for block in blocks:
        hidden = block(hidden, scale=float(hidden.sum()))
    return hidden


def with_count(hidden, blocks):
    for block in blocks:
        hidden = block(hidden, mask=torch.full((5,), hidden.shape[0]))
    return hidden


def flat(hidden, blocks):
    hidden = hidden.flatten(0, 1)
    for block in blocks:
        hidden = block(hidden)
    return hidden


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (last_only, "does not run its blocks one after the other, each once"),
        (twice, "does not run its blocks one after the other, each once"),
        (scaled_between, "changes hidden states between its blocks"),
        (with_former_inputs, "arguments that depend on what earlier blocks compute"),
        (failing, r"does not run while its blocks are left out \('no kernel"),
        (with_a_number, "gives its blocks a float that depends on"),
        (with_count, "arguments that depend on the number of sequences"),
        (flat, "hidden states of an unknown layout"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_a_line(forward, said, deep_llama):
    with pytest.raises(RequestError, match=rf"Decoder .*{said}.*llmq cannot stream it") as raised:
        recording_of(deep_llama, forward)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("unpacked", [False, True])
def test_blocks_may_return_tuples_of_any_length(length, unpacked, deep_llama):
    def forward(hidden, blocks):
        for block in blocks:
            returned = block(hidden)
            if unpacked:
                hidden, *others = returned
                assert len(others) == length - 1
            else:
                hidden = (returned[0], returned[length - 1])[0]
        return hidden

    recording = recording_of(deep_llama, forward)
    assert recording.sample.shape == (1, 8, 64)
    assert recording.arguments == [((), {})] * 3
    assert recording.shared_states() is None
    assert not recording.depends_on_tokens


def test_an_argument_that_depends_on_the_tokens_is_recorded_for_each_micro_batch(deep_llama):
    def forward(hidden, blocks):
        doubled = hidden * 2
        for i, block in enumerate(blocks):
            hidden = block(hidden, doubled, own=doubled * i, mask=torch.ones(len(hidden), 1))
        return hidden

    # Reversed, this text is the same.
    recording = recording_of(deep_llama, forward, torch.full((1, 8), 5))
    assert recording.depends_on_tokens
    assert recording.argument_bytes == (1 + 2) * recording.sample.nbytes  # the first block's own is always 0
    (doubled,), named = recording.arguments[2]
    assert isinstance(doubled, PerBatch)
    assert isinstance(named["own"], PerBatch)
    assert isinstance(named["mask"], PerSequence)
    assert isinstance(recording.arguments[0][1]["own"], PerSequence)
    assert recording.arguments[1][0][0] is doubled


def test_what_is_kept_is_that_of_the_micro_batch(deep_llama):
    def forward(hidden, blocks):
        extra = hidden[..., :3] + 1
        for block in blocks:
            hidden = block(hidden, extra)
        return hidden

    source = ModelSource(str(deep_llama))
    decoder = source.skeleton.model

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder

        def forward(self, input_ids, use_cache):
            return forward(self.inner.embed_tokens(input_ids), list(self.inner.layers))

    source.skeleton.get_decoder = Decoder
    with recorded(source, torch.arange(8)[None], CPU) as recording:
        texts = [torch.arange(16).view(2, 8) + 20, torch.arange(24).view(3, 8) + 50]
        hidden = [recording.keep(i, text) for i, text in enumerate(texts)]
    ((argument,), _) = recording.arguments[0]
    for i, states in enumerate(hidden):
        assert torch.equal(argument.values[i], states[..., :3] + 1)


def test_what_blocks_share_or_pass_on_is_recognized(deep_llama):
    def forward(hidden, blocks):
        memory, other, carried = {}, [], None
        for block in blocks:
            hidden, carried = block(hidden, memory, others={"list": other}, carried=carried)
        return hidden

    recording = recording_of(deep_llama, forward)
    assert recording.shared_states() is not None
    for i, (positional, named) in enumerate(recording.arguments):
        assert positional == (Shared(1, dict),)
        assert named == {"others": {"list": Shared(2, list)}, "carried": Carried(0) if i else None}


def test_hidden_states_may_count_sequences_in_another_dimension(deep_llama):
    def forward(hidden, blocks):
        hidden = torch.stack([hidden, hidden * 2])
        for block in blocks:
            hidden = block(hidden)
        return hidden

    recording = recording_of(deep_llama, forward)
    assert recording.batch_dim == 1
    assert recording.shape_for(7) == (2, 7, 8, 64)
