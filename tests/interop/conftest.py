"""What the tests of other people's engines share."""

import functools

import pytest
from packed import pack

from llmq.checkpoint.reader import Checkpoint

BLOCKS = {2: 0, 4: 1, 8: 2}  # which block of the demo model has these bits


@pytest.fixture(scope="session")
def demo_layers(tmp_path_factory):
    """Return a function from (bits, group size, symmetric) to the seven packed linears of a block of the demo model.

    A checkpoint holds 2, 4 and 8 bit in three blocks, and is made when it is first asked for.
    """

    @functools.cache
    def checkpoint(group_size, symmetric):
        options = {"blocks": "0-2", "layer_bits": ("layers.0.*=2", "layers.2.*=8")}
        output = tmp_path_factory.mktemp("demo") / "packed"
        return Checkpoint(pack("demo", output, group_size=group_size, symmetric=symmetric, **options))

    def layers(bits, group_size, symmetric):
        opened = checkpoint(group_size, symmetric)
        found = [opened.weight(name) for name in opened.linears if f".layers.{BLOCKS[bits]}." in name]
        assert len(found) == 7
        assert {(w.bits, w.q.shape[1] // w.scale.shape[1], w.symmetric) for w in found} == {
            (bits, group_size, symmetric)
        }
        return found

    return layers
