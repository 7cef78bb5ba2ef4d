"""A checkpoint is finished or plainly not, and nothing of an older one is mixed into it."""

import errno
import json
import os
import stat

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from written import KILOBYTE, complete_source, names_in, numbers, write

from llmq.checkpoint import writer as writer_module
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.writer import Writer
from llmq.core.errors import RequestError, WorkError
from llmq.models.safetensors_files import INDEX, SINGLE


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return complete_source(tmp_path_factory.mktemp("source"))


def fail_midway(directory, error, overwrite=False):
    with Writer(directory, overwrite, shard_bytes=1024) as writer:
        writer.put({"a": numbers(KILOBYTE)})
        writer.put({"b": numbers(KILOBYTE)})
        assert names_in(writer.work) == ["part-00000.safetensors"]
        raise error


def test_parts_are_on_disk_as_soon_as_they_are_full_or_flushed(tmp_path):
    with Writer(tmp_path, shard_bytes=2048) as writer:
        writer.put({"a": numbers(KILOBYTE)})
        writer.put({"b": numbers(KILOBYTE, 7)})
        assert names_in(writer.work) == []
        writer.put({"c": numbers(KILOBYTE)})
        assert names_in(writer.work) == ["part-00000.safetensors"]
        assert writer.parts == 1
        written = writer.read_parts(0, 1)
        assert written.keys() == {"a", "b"}
        assert torch.equal(written["b"], numbers(KILOBYTE, 7))
        writer.flush()
        assert writer.read_parts(1, 2).keys() == {"c"}
        writer.flush()
        assert writer.parts == 2
        assert names_in(writer.stage) == []
        assert names_in(tmp_path) == ["unfinished.partial"]


def test_tensors_put_together_share_a_shard_however_small_it_is(tmp_path, source):
    with Writer(tmp_path, shard_bytes=1024) as writer:
        writer.put({"x.q": numbers(KILOBYTE), "x.scale": numbers(KILOBYTE)})
        writer.put({"y.q": numbers(KILOBYTE), "y.scale": numbers(KILOBYTE)})
        writer.finish(companions_of(source), torch.float16)
    weight_map = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert weight_map["x.q"] == weight_map["x.scale"] != weight_map["y.q"] == weight_map["y.scale"]


def test_a_single_shard_has_no_index_and_says_it_holds_torch_tensors(tmp_path, source):
    write(tmp_path, source, {"a": numbers(4)})
    assert not (tmp_path / INDEX).exists()
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_views_and_aliases_are_stored_as_plain_copies(tmp_path, source):
    base = numbers(6).view(2, 3)
    with Writer(tmp_path) as writer:
        writer.put({"transposed": base.T, "row": base[1], "same": base})
        base += 100  # what was put is no longer the caller's
        writer.finish(companions_of(source), torch.float16)
    stored = load_file(tmp_path / SINGLE)
    expected = numbers(6).view(2, 3)
    assert torch.equal(stored["transposed"], expected.T)
    assert torch.equal(stored["row"], expected[1])
    assert torch.equal(stored["same"], expected)


def test_config_json_appears_last_and_complete(tmp_path, source, monkeypatch):
    there_before = []

    def replace(old, new):
        if new == tmp_path / "config.json":
            there_before.extend(names_in(tmp_path))
        os.rename(old, new)

    monkeypatch.setattr(writer_module.os, "replace", replace)
    with Writer(tmp_path, shard_bytes=1024) as writer:
        for name in "abc":
            writer.put({name: numbers(KILOBYTE)})
            assert not list(tmp_path.glob("*.json"))
            assert not list(tmp_path.glob("*.safetensors"))
        writer.finish(companions_of(source), torch.float16, {"quant_method": "ours"}, lambda: {"seed": 1})
    assert {*there_before} - {"unfinished.partial"} == {*names_in(tmp_path)} - {"config.json"}
    assert {REPORT, INDEX, "tokenizer.json"} < {*there_before}
    assert not list(tmp_path.glob("*.partial"))


def test_files_have_the_permissions_the_umask_gives(tmp_path, source):
    before = os.umask(0o027)
    try:
        write(tmp_path, source, {"a": numbers(4)})
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in (SINGLE, "config.json")} == {0o640}


def test_overwrite_removes_the_old_checkpoint_and_keeps_other_files(tmp_path, source):
    stale = ["quantize_config.json", "quant_config.json", "model-00007-of-00009.safetensors", "merges.txt"]
    stale += ["shard-00003.partial"]
    for name in [*stale, "notes.md", "run.log"]:
        (tmp_path / name).write_text("old")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00007-of-00009.safetensors"}}')
    write(tmp_path, source, {"a": numbers(4)}, overwrite=True)
    assert not {*stale, INDEX} & {*names_in(tmp_path)}
    assert (tmp_path / "notes.md").read_text() == (tmp_path / "run.log").read_text() == "old"
    assert torch.equal(load_file(tmp_path / SINGLE)["a"], numbers(4))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_midway_removes_the_directory_it_made(error, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(error, match="midway"):
        fail_midway(output, error("midway"))
    assert not output.exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_midway_leaves_only_foreign_files_in_a_directory_that_was_there(overwrite, tmp_path):
    if overwrite:
        (tmp_path / "notes.md").write_text("mine")
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="midway"):
        fail_midway(tmp_path, ValueError("midway"), overwrite)
    assert names_in(tmp_path) == ["notes.md"] * overwrite


def test_a_workroom_is_gone_whether_the_work_succeeds_or_fails_and_one_left_over_is_cleared(tmp_path, source):
    def work(directory, end, overwrite=False):
        with Writer(directory, overwrite) as writer:
            with writer.workroom() as first:
                assert names_in(first.work) == []
                first.put({"a": numbers(4)})
                end(first)
            assert not first.directory.exists()
            writer.put({"b": numbers(4)})
            writer.finish(companions_of(source), torch.float16)

    work(tmp_path / "good", lambda first: first.finish(companions_of(source), torch.float16))
    assert not list((tmp_path / "good").glob("*.partial"))
    assert load_file(tmp_path / "good" / SINGLE).keys() == {"b"}
    left_over = tmp_path / "old" / "unfinished.partial" / "work" / "first"
    left_over.mkdir(parents=True)
    (left_over / "part-00000.safetensors").write_text("left over")
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path / "old", interrupt, overwrite=True)
    assert names_in(tmp_path / "old") == []


def interrupt(_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full"),
        (SafetensorError("I/O error: File too large (os error 27)"), "disk full or file size limited"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_what_the_disk_refuses_is_a_work_error_that_names_the_directory(error, said, tmp_path, source, monkeypatch):
    def save_file(*_, **__):
        raise error

    monkeypatch.setattr(writer_module, "save_file", save_file)
    output = tmp_path / "out"
    with pytest.raises(WorkError, match=said) as caught:
        write(output, source, {"a": numbers(4), "b": numbers(4)}, shard_bytes=1)
    assert str(output) in str(caught.value)
    assert not output.exists()


def test_a_directory_in_use_is_refused_untouched_and_an_empty_one_accepted(tmp_path, source):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"is not empty.*--overwrite"), Writer(tmp_path / "used"):
        raise AssertionError("must not be entered")
    assert (tmp_path / "used" / "config.json").read_text() == "{}"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", source, {"a": numbers(4)})
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_file_is_refused(overwrite, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RequestError, match="is a file"), Writer(tmp_path / "out", overwrite):
        raise AssertionError("must not be entered")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_that_cannot_be_made_is_a_work_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkError, match="cannot write to"), Writer(tmp_path / "file" / "out"):
        raise AssertionError("must not be entered")
