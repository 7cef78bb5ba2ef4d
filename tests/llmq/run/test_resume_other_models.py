"""Models that are not like Llama resume to the same bytes.

Their blocks take what depends on the tokens, leave keys and values for later ones, share weights, or lie transposed.
"""

from dataclasses import replace

import pytest
from architectures.tiny_models import save_tiny
from killed import interrupted, quantize_together, result_of, small_run

import llmq
from llmq.calibration.block_stream import _StreamedStates


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories of the two models, by name."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("gemma4_text", "gemma4_text@shared")}
    for name, directory in made.items():
        save_tiny(name, directory)
    return made


@pytest.mark.parametrize(
    ("name", "on_disk", "entered"),
    [("gemma4_text", False, [0, 1]), ("gemma4_text", True, [1]), ("gemma4_text@shared", True, [0, 1, 2, 3])],
)
def test_a_run_goes_on_to_the_same_bytes(name, on_disk, entered, saved, text_file, tmp_path, monkeypatch):
    config = small_run(saved[name], text_file, tmp_path)
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    config = replace(config, offload_dir=tmp_path / "states" if on_disk else None)
    interrupted(config, monkeypatch, blocks=len(entered) // 2 or 1)
    seen, enter = [], _StreamedStates.enter
    monkeypatch.setattr(_StreamedStates, "enter", lambda self, *which: seen.append(which[0]) or enter(self, *which))
    llmq.quantize(replace(config, resume=True))
    assert seen == entered
    assert result_of(config.output) == result_of(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.states"))


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4_text"])
def test_a_mixture_ends_in_the_same_bytes_on_disk_resumed_and_in_two_processes(name, text_file, tmp_path, monkeypatch):
    save_tiny(name, tmp_path / "model")
    config = small_run(tmp_path / "model", text_file, tmp_path)
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    for output, directory in (("resumed", None), ("on-disk", tmp_path / "states")):
        config = replace(config, output=tmp_path / output, offload_dir=directory)
        interrupted(config, monkeypatch, blocks=1)
        llmq.quantize(replace(config, resume=True))
    assert not list(tmp_path.rglob("*.states"))
    assert quantize_together(replace(config, output=tmp_path / "together"), 2) == [0, 0]
    for output in ("resumed", "on-disk", "together"):
        assert result_of(tmp_path / output) == result_of(tmp_path / "whole")


def test_the_sample_passes_all_blocks_although_no_text_does(saved, text_file, tmp_path, monkeypatch):
    config = replace(small_run(saved["gemma4_text@shared"], text_file, tmp_path), method="rtn")
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    interrupted(config, monkeypatch, blocks=3)
    llmq.quantize(replace(config, resume=True))
    assert result_of(config.output) == result_of(tmp_path / "whole")


@pytest.mark.parametrize(("name", "chosen", "finished"), [("zamba2", "", 2), ("gpt2", "1", 1)])
def test_finished_blocks_get_the_weights_that_stay_in_float(name, chosen, finished, text_file, tmp_path, monkeypatch):
    """Zamba's are stored once for several blocks; GPT-2's lie transposed, those of a block that is not chosen."""
    save_tiny(name, tmp_path / "model")
    config = replace(small_run(tmp_path / "model", text_file, tmp_path), blocks=chosen)
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    interrupted(config, monkeypatch, finished)
    llmq.quantize(replace(config, resume=True))
    assert result_of(config.output) == result_of(tmp_path / "whole")


def test_several_processes_write_the_same_bytes(saved, text_file, tmp_path):
    config = small_run(saved["gemma4_text@shared"], text_file, tmp_path)
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    assert quantize_together(config, 2) == [0, 0]
    assert result_of(config.output) == result_of(tmp_path / "whole")
