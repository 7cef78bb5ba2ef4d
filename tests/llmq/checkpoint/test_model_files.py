"""The files beside the weights are copied byte for byte, and only those that belong to the model."""

import os

import pytest
from packed import pack
from written import complete_source, numbers, write

from llmq.checkpoint.model_files import companions_in
from llmq.checkpoint.writer import Writer
from llmq.core.errors import CheckpointError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return complete_source(tmp_path_factory.mktemp("source"))


def test_companions_are_copied_byte_for_byte(tmp_path, source):
    write(tmp_path, source, {"a": numbers(4)})
    companions = ["generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    companions += ["chat_template.jinja", "modeling_own.py", "additional_chat_templates/tools.jinja"]
    companions += ["README.md", "LICENSE", "own.tiktoken"]
    for name in companions:
        assert (tmp_path / name).read_bytes() == (source.directory / name).read_bytes()
    for name in ("training_args.bin", "model.safetensors.index.json", "adapter_config.json", ".gitattributes"):
        assert not (tmp_path / name).exists()


def test_what_the_hub_keeps_as_links_is_copied_as_files(tmp_path, source):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for i, name in enumerate(["config.json", "tokenizer.json", "additional_chat_templates/tools.jinja"]):
        (blobs / str(i)).write_bytes((source.directory / name).read_bytes())
        (snapshot / name).symlink_to(blobs / str(i))
    with Writer(tmp_path / "out") as writer:
        writer.put({"a": numbers(4)})
        writer.finish(companions_in(snapshot))
    for name in ("tokenizer.json", "additional_chat_templates/tools.jinja"):
        assert not (tmp_path / "out" / name).is_symlink()
        assert (tmp_path / "out" / name).read_bytes() == (source.directory / name).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "own.py", "additional_chat_templates/tools.jinja"])
@pytest.mark.parametrize("odd", ["link", "pipe"])
def test_a_companion_that_is_no_file_of_the_model_is_refused(name, odd, tmp_path):
    (tmp_path / "secret").write_text('{"key": 1}')
    model = tmp_path / "model"
    (model / "additional_chat_templates").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / name).unlink(missing_ok=True)
    if odd == "link":
        (model / name).symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(model / name)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"is a link out of the directory|is not a regular file"):
        companions_in(model).write(tmp_path / "out")


def test_files_that_no_model_is_known_to_use_are_left_out_if_they_are_odd(tmp_path):
    (tmp_path / "secret").write_text("{}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "notes").symlink_to(tmp_path / "secret")
    os.mkfifo(model / "queue")
    (model / "folder").mkdir()
    (tmp_path / "out").mkdir()
    companions_in(model).write(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_was_copied_is_removed_when_the_result_is_replaced(source, llama, tmp_path):
    output = pack(source.directory, tmp_path / "out")
    (output / "mine.txt").write_text("")
    assert (output / "own.tiktoken").exists()
    pack(llama, output, overwrite=True)
    assert not (output / "own.tiktoken").exists()
    assert (output / "mine.txt").exists()
