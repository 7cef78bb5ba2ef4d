"""Files that stock transformers would fill with random weights are known before they are written."""

import pytest
import torch
from architectures.tiny_models import save_tiny
from commands import run_here
from packed import pack
from transformers import AutoModelForCausalLM

from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import RequestError
from llmq.models.conv1d import CONV1D
from llmq.models.model_source import ModelSource
from llmq.models.stock_loading import EXPERTS, ZEROS, unreadable
from llmq.run import prepare
from llmq.run.convert import ConvertConfig, convert
from llmq.verification.compare import VerifyConfig, verify

FOUND = ["qwen3_moe", "mixtral", "nemotron_h", "lfm2_moe", "llama4_text"]
RANDOM = ["gpt_oss", "granitemoe", "gemma4_text@moe", "dbrx", "aria_text"]


def source_of(name, directory):
    save_tiny(name, directory)
    return ModelSource(str(directory))


@pytest.mark.parametrize("name", [*FOUND, *RANDOM])
def test_what_is_said_of_experts_is_what_transformers_does(name, tmp_path, monkeypatch):
    """It puts random weights where its load report names missing ones."""
    source = source_of(name, tmp_path / "model")
    fault = unreadable(source.skeleton, source.files, lambda _: True)
    assert fault == (EXPERTS.format(type(source.skeleton).__name__) if name in RANDOM else None)
    monkeypatch.setattr(prepare, "unreadable", lambda *_: None)
    packed = pack(tmp_path / "model", tmp_path / "packed")
    _, report = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, output_loading_info=True)
    assert bool(report["missing_keys"]) == (name in RANDOM)
    assert verify(VerifyConfig(packed))["transformers"] == fault


@pytest.mark.parametrize(("name", "fault"), [("qwen3_moe", ZEROS), ("llama4_text", None), ("gpt2", CONV1D)])
def test_zero_points_of_experts_are_not_read_but_for_experts_that_become_linears_there(name, fault, tmp_path):
    source = source_of(name, tmp_path)
    assert unreadable(source.skeleton, source.files, lambda _: False) == fault


def test_experts_that_are_not_packed_are_no_fault(tmp_path):
    source = source_of("gpt_oss", tmp_path)
    assert unreadable(source.skeleton, source.files, {"model.layers.0.self_attn.q_proj": True}.get) is None


def test_such_experts_are_stored_as_gptq_which_transformers_does_not_open_without_its_package(tmp_path):
    save_tiny("gpt_oss", tmp_path / "model")
    packed = pack(tmp_path / "model", tmp_path / "packed", format="auto")
    assert Checkpoint(packed).format.METHOD == "gptq"
    with pytest.raises(ImportError):
        AutoModelForCausalLM.from_pretrained(packed)
    for attempt in (
        lambda: pack(tmp_path / "model", tmp_path / "again"),
        lambda: pack(tmp_path / "model", tmp_path / "again", format="auto", bits=5),
        lambda: convert(ConvertConfig(packed, tmp_path / "again", "compressed-tensors")),
    ):
        with pytest.raises(RequestError, match="choose --format gptq") as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("bits", "warns"), [(3, True), (4, False), (8, False)])
def test_widths_that_engines_do_not_take_for_experts_are_noted(bits, warns, tmp_path):
    save_tiny("qwen3_moe", tmp_path / "model")
    packed = pack(tmp_path / "model", tmp_path / "packed", bits=bits)
    assert ("vLLM and SGLang take only 4 and 8 bit" in (packed / "llmq_report.json").read_text()) is warns


def test_verify_names_a_file_of_others_in_one_line(tmp_path, monkeypatch):
    save_tiny("granitemoe", tmp_path / "model")
    monkeypatch.setattr(prepare, "unreadable", lambda *_: None)
    done = run_here("llmq.verify", pack(tmp_path / "model", tmp_path / "packed"))
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in done.stdout.splitlines() if line.startswith("note: transformers finds no packed experts")]
