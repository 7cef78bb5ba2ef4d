"""What a finished checkpoint holds beside its tensors, and that it is looked at before others see it."""

import errno
import json
import os
from dataclasses import replace

import pytest
import torch
from written import KILOBYTE, complete_source, names_in, numbers, write

from llmq.checkpoint import model_files as companions_module
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.writer import Writer
from llmq.core.errors import CheckpointError, WorkError
from llmq.models.model_source import ModelSource
from llmq.models.safetensors_files import SINGLE


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return complete_source(tmp_path_factory.mktemp("source"))


def test_config_json_is_the_sources_own_with_dtype_and_quantization(tmp_path, source):
    write(tmp_path, source, {"a": numbers(4)}, report=lambda: {"seed": 1})
    original = json.loads((source.directory / "config.json").read_text())
    changed = {"dtype": "float16", "torch_dtype": "float16", "quantization_config": {"quant_method": "ours"}}
    assert json.loads((tmp_path / "config.json").read_text()) == original | changed
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["seed"] == 1
    assert {"LICENSE", "tokenizer.json", "additional_chat_templates"} <= set(report["copied"])


def test_without_a_dtype_the_config_keeps_its_own(tmp_path, source):
    with Writer(tmp_path) as writer:
        writer.put({"a": numbers(4)})
        writer.finish(companions_of(source))
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (source.directory / "config.json").read_text()
    )


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_only_gptq_keeps_a_second_copy_of_its_config_where_its_tools_look_first(method, tmp_path, source):
    config = {"quant_method": method, "bits": 4}
    write(tmp_path, source, {"a": numbers(4)}, quantization_config=config)
    second = tmp_path / "quantize_config.json"
    assert second.exists() == (method == "gptq")
    assert method != "gptq" or json.loads(second.read_text()) == config


def test_settings_of_mlx_are_where_its_tools_look_and_no_others_stay_there(tmp_path, source):
    settings = {"bits": 4, "group_size": 64, "mode": "affine"}
    write(tmp_path / "mlx", source, {"a": numbers(4)}, quantization_config=settings)
    config = json.loads((tmp_path / "mlx/config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == settings
    companions = replace(companions_of(source), config=config)
    with Writer(tmp_path / "other") as writer:
        writer.put({"a": numbers(4)})
        writer.finish(companions, quantization_config={"quant_method": "awq"})
    assert "quantization" not in json.loads((tmp_path / "other/config.json").read_text())


def test_a_failure_while_finishing_leaves_nothing_either(tmp_path, source, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(companions_module.shutil, "copyfile", fail)
    with pytest.raises(WorkError, match="disk full"):
        write(tmp_path, source, {"a": numbers(KILOBYTE), "b": numbers(KILOBYTE)}, shard_bytes=1024)
    assert names_in(tmp_path) == []


def test_the_check_sees_a_directory_that_opens_and_the_report_is_asked_after_it(tmp_path, source):
    asked = []

    def check(directory):
        asked.append("check")
        assert names_in(tmp_path) == ["unfinished.partial"]
        assert REPORT not in names_in(directory)
        opened = ModelSource(str(directory))
        assert torch.equal(opened.files.read("model.norm.weight"), source.read("model.norm.weight"))
        assert opened.tokenizer("a word") == source.tokenizer("a word")

    def report():
        asked.append("report")
        return {"checked": len(asked)}

    tensors = {name: source.read(name) for name in source.files.names()}
    with Writer(tmp_path, shard_bytes=100_000) as writer:
        for name, tensor in tensors.items():
            writer.put({name: tensor})
        writer.finish(companions_of(source), torch.float32, None, report, check)
    assert asked == ["check", "report"]
    assert json.loads((tmp_path / REPORT).read_text())["checked"] == 2
    assert ModelSource(str(tmp_path)).files.names() == tensors.keys()


@pytest.mark.parametrize("error", [CheckpointError, KeyboardInterrupt])
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("asked", ["check", "report"])
def test_a_check_or_report_that_fails_leaves_nothing(asked, there, error, tmp_path, source):
    def fail(*_):
        raise error("damaged")

    output = tmp_path / "out"
    if there:
        output.mkdir()
        (output / "notes.md").write_text("mine")
        (output / "config.json").write_text("{}")
    with pytest.raises(error, match="damaged"):
        write(output, source, {"a": numbers(4)}, overwrite=there, **{asked: fail})
    assert not there or names_in(output) == ["notes.md"]
    assert output.exists() == there


def test_while_it_works_nothing_in_the_directory_looks_like_a_checkpoint(tmp_path, source):
    def check(directory):
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".json", ".safetensors")]

    write(tmp_path, source, {"a": numbers(4)}, check=check)
    assert {"config.json", SINGLE} < {*names_in(tmp_path)}


def test_templates_of_an_older_checkpoint_are_replaced_as_a_whole(tmp_path, source):
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "stale.jinja").write_text("old")
    write(tmp_path, source, {"a": numbers(4)}, overwrite=True, report=dict)
    assert names_in(tmp_path / "additional_chat_templates") == ["tools.jinja"]
    without = replace(companions_of(source), write=lambda _: None)
    with Writer(tmp_path, overwrite=True) as writer:
        writer.put({"a": numbers(4)})
        writer.finish(without, torch.float16)
    assert names_in(tmp_path) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("state", ["streaming", "joining", "staged", "checked", "published"])
def test_every_state_that_a_kill_may_leave_is_continued_to_the_same_checkpoint(state, tmp_path, source, monkeypatch):
    replace_file, tensors, output = os.replace, {"a": numbers(4), "b": numbers(4, 4)}, tmp_path / "out"
    stops_at = {"joining": SINGLE, "staged": "config.json", "checked": SINGLE, "published": "emptied.partial"}

    def replace_or_stop(old, new):
        if new.name == stops_at.get(state) and (new.parent == output or state in ("joining", "staged")):
            raise KeyboardInterrupt
        replace_file(old, new)

    def begin():
        with Writer(output) as writer:
            writer.resumable = True
            writer.put({"a": tensors["a"]})
            writer.flush()
            if state == "streaming":
                raise KeyboardInterrupt
            writer.put({"b": tensors["b"]})
            writer.finish(companions_of(source), torch.float16)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_or_stop)
        with pytest.raises(KeyboardInterrupt):
            begin()
    with Writer(output, resume=True) as writer:
        assert writer.is_checked == (state in ("checked", "published"))
        assert not writer.is_finished
        if writer.is_checked:
            writer.publish()
        else:
            writer.keep_parts(1 if state == "streaming" else 2)
            if state == "streaming":
                writer.put({"b": tensors["b"]})
            writer.finish(companions_of(source), torch.float16)
        assert writer.is_finished
    write(tmp_path / "whole", source, tensors, quantization_config=None)
    assert names_in(output) == names_in(tmp_path / "whole")
    for name in (SINGLE, "config.json"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
