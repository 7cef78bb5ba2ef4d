"""The decoder blocks are found by the number that the configuration names."""

from types import SimpleNamespace

import pytest
from torch import nn

from llmq.core.errors import RequestError
from llmq.models.decoder_blocks import find_blocks, shared_by_blocks


def linears(count, width=4):
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


class Model(nn.Module):
    """A model of these parts inside `model`, with such a configuration."""

    def __init__(self, parts, config, tied=None):
        super().__init__()
        self.model = nn.ModuleDict(parts)
        self.config = SimpleNamespace(**config)
        self.config.get_text_config = lambda: self.config
        self.all_tied_weights_keys = tied or {}

    def get_decoder(self):
        return self.model


def test_lists_of_other_lengths_and_smaller_ones_do_not_count():
    model = Model({"a": linears(3, 2), "layers": linears(3), "b": linears(5, 9)}, {"num_hidden_layers": 3})
    assert find_blocks(model) == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_lists_within_a_block_do_not_count():
    layers = nn.ModuleList(nn.ModuleDict({"experts": linears(2, 50)}) for _ in range(2))
    assert find_blocks(Model({"layers": layers}, {"num_hidden_layers": 2})) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("key", ["num_layers", "decoder_layers"])
def test_other_names_of_the_number_are_tried(key):
    model = Model({"layers": linears(2)}, {"num_hidden_layers": 4, key: 2})
    assert find_blocks(model) == ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize(
    ("parts", "found"), [({"layers": linears(3)}, 0), ({"L": linears(2), "H": linears(2)}, 2)], ids=["none", "two"]
)
def test_without_one_list_the_model_is_refused(parts, found):
    with pytest.raises(RequestError, match=rf"Model does not expose one list of 2 decoder blocks \(found {found}\)"):
        find_blocks(Model(parts, {"num_hidden_layers": 2}))


def test_weights_that_blocks_share_are_known_by_all_their_names():
    tied = {"model.layers.1.weight": "model.layers.0.weight", "lm_head.weight": "model.embed.weight"}
    model = Model({"layers": linears(2)}, {"num_hidden_layers": 2}, tied)
    assert shared_by_blocks(model, find_blocks(model)) == {"model.layers.0.weight", "model.layers.1.weight"}
