"""Blocks with random weights show how the real ones are made."""

import pytest
from planned import open_run
from tiny import save_tiny

import llmq
from llmq.core.errors import WorkError
from llmq.plan.block_shapes import block_ranges, layouts
from llmq.run.block_quantizer import Run


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2", "phi3", "olmo2"])
def test_blocks_with_random_weights_are_made_of_what_the_real_ones_are(name, tmp_path, text_file, monkeypatch):
    found = []

    def spy(self, block, groups, *_):
        found.append(groups)
        raise WorkError("seen")

    model = save_tiny(tmp_path / "model", name)
    request, run = open_run(model, text_file, tmp_path / "out")
    (layout,) = layouts(request, run)
    monkeypatch.setattr(Run, "_transform", spy)
    with pytest.raises(WorkError, match="seen"):
        llmq.quantize(request.config)
    assert list(layout.groups) == found[0]
    assert all(p.is_meta for p in request.source.skeleton.parameters())  # nothing of them stays


@pytest.mark.parametrize(("some", "said"), [("", ""), ("a", "0"), ("abcf", "0-2,5"), ("bdef", "1,3-5"), ("f", "5")])
def test_blocks_are_named_by_ranges_of_their_positions(some, said):
    assert block_ranges("abcdef", some) == said
