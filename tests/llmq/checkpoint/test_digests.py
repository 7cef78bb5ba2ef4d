"""A digest tells a tensor from every other one, and a checkpoint computes it while it is read."""

import pytest
import torch
from packed import pack

from llmq.checkpoint.digests import DigestingCheckpoint, digest, digests_of
from llmq.checkpoint.reader import Checkpoint
from llmq.core.quantized_weight import QuantizedWeight

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, llama):
    return pack(llama, tmp_path_factory.mktemp("sound") / "packed")


def test_the_digest_of_a_weight_knows_every_part_of_it():
    weight = QuantizedWeight(
        torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 2), torch.full((2, 2), 8, dtype=torch.uint8), 4
    )
    others = [
        QuantizedWeight(weight.q + 1, weight.scale, weight.zero, 4),
        QuantizedWeight(weight.q, weight.scale * 2, weight.zero, 4),
        QuantizedWeight(weight.q, weight.scale.half(), weight.zero, 4),
        QuantizedWeight(weight.q, weight.scale, weight.zero - 1, 4),
        QuantizedWeight(weight.q, weight.scale, weight.zero, 4, torch.tensor([0, 1, 0, 1], dtype=torch.int32)),
    ]
    assert len({digest(each) for each in [weight, *others]}) == 6
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))


def test_a_digest_is_that_of_the_values_and_not_of_how_they_lie_in_memory():
    values = torch.arange(6.0).view(2, 3)
    assert digest(values) == digest(values.T.contiguous().T)
    assert digest(values) != digest(values.double())


def test_what_was_noted_is_the_digest_of_everything(sound):
    noted = DigestingCheckpoint(sound)
    for name in noted.linears:
        noted.weight(name)
    for name in noted.other_names:
        noted.read(name)
    assert noted.digests == digests_of(Checkpoint(sound))


def test_tensors_in_memory_are_digested_instead_of_those_on_disk(sound):
    checkpoint = Checkpoint(sound)
    stored = digests_of(checkpoint)
    codes = {name: checkpoint.read(name) for name in checkpoint.packed_names if name.startswith(f"{UP}.")}
    codes[f"{UP}.weight_packed"] = codes[f"{UP}.weight_packed"] ^ 1
    changed = digests_of(checkpoint, codes | {"model.norm.weight": torch.zeros(64)})
    assert {name for name in stored if stored[name] != changed[name]} == {UP, "model.norm.weight"}
