"""The commands as a user runs them: exit codes, messages, what is left on disk."""

import json
import math
import os
import resource
import signal
import subprocess

import pytest
import torch
from commands import ENVIRONMENT, ROOT, command, error_of, run, run_here
from forked import Forked, run_forked
from safetensors.torch import load_file, save_file
from tiny import save_tiny, some_text

PHASES = ("forward", "statistics", "solve", "write")
SMALL = ("--group-size", "32", "--samples", "10", "--sequence-length", "64")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    (directory / "empty.txt").write_text(" \n\n")
    (directory / "short.txt").write_text("a" * 500)
    return directory


@pytest.fixture(scope="module")
def packed(llama, text_file, tmp_path_factory):
    """A checkpoint that `python -m llmq.quantize` wrote, and the finished process."""
    output = tmp_path_factory.mktemp("packed") / "new" / "checkpoint"
    arguments = ("--model", llama, "--output", output, "--calibration", text_file, "--seed", "3", *SMALL)
    result = run("llmq.quantize", *arguments)
    assert result.returncode == 0, result.stderr
    return output, result


REFUSED = {
    "method": (("--method", "gtpq"), ("method", "gptq, awq, awq+gptq, tuned, rtn", "gtpq")),
    "bits": (("--bits", "7"), ("bits", "2, 3, 4, 5, 6, 8", "7")),
    "format": (("--format", "ggml"), ("format", "compressed-tensors", "gguf", "ggml")),
    "without": (("--without", "sequential"), ("match needs sequential", "--without match sequential")),
    "group_size": (("--group-size", "24"), ("group size 24", "64, 96")),
    "blocks": (("--blocks", "1-7"), ("blocks are numbers and ranges", "below 2", "1-7")),
    "empty_text": (("--calibration", "{texts}/empty.txt"), ("text is empty",)),
    "short_text": (("--calibration", "{texts}/short.txt"), ("has 500 tokens", "need 640", "--samples")),
    "context": (("--sequence-length", "512"), ("512", "256")),
    "model": (("--model", "./no/such/model"), ("no such model", "no/such/model")),
}


@pytest.mark.parametrize(("arguments", "said"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_cannot_be_met_exits_with_2_and_writes_nothing(
    arguments, said, llama, text_file, texts, tmp_path
):
    output = tmp_path / "out"
    defaults = ("--model", llama, "--output", output, "--calibration", text_file, *SMALL)
    result = run_here("llmq.quantize", *defaults, *(argument.format(texts=texts) for argument in arguments))
    assert result.returncode == 2
    message = error_of(result)
    assert all(words in message for words in said), message
    assert result.stdout == ""
    assert not output.exists()


def test_an_output_in_use_is_refused_and_kept_then_replaced_with_overwrite(llama, tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "config.json").write_text("{}")
    arguments = ("--model", llama, "--output", tmp_path, "--method", "rtn", "--group-size", "32")
    result = run_here("llmq.quantize", *arguments)
    assert result.returncode == 2
    assert "not empty" in error_of(result)
    assert "--overwrite" in error_of(result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.md"]
    assert (tmp_path / "config.json").read_text() == "{}"

    assert run_here("llmq.quantize", *arguments, "--overwrite").returncode == 0
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())


def test_a_full_disk_exits_with_1_and_leaves_no_directory(llama, tmp_path):
    output = tmp_path / "out"
    limit = 100_000  # bytes a file may have; the embeddings alone need twice as many
    result = run_forked(
        *("llmq.quantize", "--model", llama, "--output", output, "--method", "rtn", "--group-size", "32"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1
    assert "disk full" in error_of(result)
    assert str(output) in error_of(result)
    assert not output.exists()


def test_ctrl_c_midway_exits_with_1_and_leaves_no_directory(llama, tmp_path):
    output, text = tmp_path / "out", tmp_path / "long.txt"
    text.write_text(some_text(90_000))
    arguments = ("--model", llama, "--output", output, "--calibration", text, "--group-size", "32")
    process = Forked(
        command("llmq.quantize", *arguments, "--samples", "2000", "--sequence-length", "250"),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts its background jobs deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        shown = b""
        while b"blocks" not in shown:  # the progress bar: the work has begun
            shown += os.read(process.stderr.fileno(), 4096) or pytest.fail(f"ended early: {shown}")
        assert output.is_dir()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    result = subprocess.CompletedProcess(process.args, process.returncode, "", (shown + rest).decode())
    assert result.returncode == 1
    assert "interrupted" in error_of(result)
    assert not output.exists()


def test_a_corrupt_shard_exits_with_1_and_names_the_file(tmp_path):
    model = save_tiny(tmp_path / "model", shard_size="200KB")
    shard = sorted(model.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1000])
    result = run_here("llmq.quantize", "--model", model, "--output", tmp_path / "out", "--method", "rtn")
    assert result.returncode == 1
    assert shard.name in error_of(result)
    assert "corrupt or truncated" in error_of(result)
    assert not (tmp_path / "out").exists()


def test_nan_weights_exit_with_1_and_name_the_tensor(tmp_path):
    model = save_tiny(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][5, 7] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    arguments = ("--model", model, "--output", tmp_path / "out", "--method", "rtn", "--group-size", "32")
    result = run_here("llmq.quantize", *arguments)
    assert result.returncode == 1
    assert "model.layers.0.mlp.down_proj.weight" in error_of(result)
    assert "NaN" in error_of(result)
    assert not (tmp_path / "out").exists()


def test_the_report_tells_time_error_damping_versions_seed_and_command(packed):
    output, result = packed
    report = json.loads((output / "llmq_report.json").read_text())
    assert all(report["seconds"][phase] > 0 for phase in PHASES)
    assert sum(report["seconds"][phase] for phase in PHASES) < report["seconds"]["total"]
    assert len(report["groups"]) == 2 * 4
    assert report["groups"][0]["linears"] == [f"self_attn.{name}_proj" for name in "qkv"]
    for group in report["groups"]:
        assert 0 < group["error"] < 1
        assert 0 < group["rtn_error"] < 1
        assert group["damping"] == 0.05
        assert (group["tokens"], group["dropped_rows"]) == (9 * 64, 0)
    assert report["versions"]["torch"] == torch.__version__
    assert {"transformers", "safetensors"} < report["versions"].keys()
    assert report["config"]["seed"] == 3
    assert f"--output {output}" in report["command"]
    assert report["notes"] == []
    assert "worst layers" in result.stderr
    assert result.stderr.rstrip().endswith(f"wrote {output}")


def test_inspect_json_is_one_object_that_accounts_for_every_byte(packed):
    output, _ = packed
    result = run_here("llmq.inspect", output, "--json")
    assert result.returncode == 0, result.stderr
    about = json.loads(result.stdout)
    assert (about["bits"], about["symmetric"], about["format"]) == ([4], True, "compressed-tensors")
    assert len(about["layers"]) == 2 * 7
    assert {layer["group_size"] for layer in about["layers"]} == {32}
    assert about["packed_weights"] == 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 96)
    # 4 bits, a 16-bit scale for every 32 weights, and two int64 of shape for each layer
    expected = about["packed_weights"] * (4 + 16 / 32) / 8 + 2 * 7 * 2 * 8
    assert about["packed_bytes"] == expected
    tensors = load_file(output / "model.safetensors").values()
    assert about["packed_bytes"] + about["other_bytes"] == sum(tensor.nbytes for tensor in tensors)


def test_eval_json_is_one_object_with_perplexity_and_kl(packed, llama, text_file):
    output, _ = packed
    arguments = ("--text", text_file, "--sequence-length", "128", "--limit", "3", "--json")
    result = run_here("llmq.eval", "--model", output, "--reference", llama, *arguments)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert (figures["chunks"], figures["tokens"]) == (3, 3 * 127)
    assert figures["perplexity"] > 1
    assert 0 < figures["kl"] < 1


def test_generate_prints_text_on_stdout_and_speed_on_stderr(packed):
    output, _ = packed
    result = run_here("llmq.generate", "--model", output, "--prompt", "once upon", "--no-chat", "--max-new-tokens", "4")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("once upon")
    assert len(result.stdout.strip()) > len("once upon")
    assert "tokens/s" in result.stderr


def test_llmq_without_a_command_lists_the_commands():
    result = run_here("llmq.__main__")
    assert result.returncode == 0
    assert all(f"llmq {name}" in result.stdout for name in ("quantize", "eval", "generate", "inspect"))


def test_an_unknown_command_exits_with_2_and_lists_the_commands():
    result = run_here("llmq.__main__", "quantise")
    assert result.returncode == 2
    assert "quantise" in error_of(result)
    assert "llmq quantize" in result.stderr


def test_help_names_every_flag_through_the_llmq_command():
    result = run_forked("llmq", "quantize", "--help")
    assert result.returncode == 0
    flags = "model output method bits group-size symmetric format calibration samples sequence-length seed device"
    assert [flag for flag in flags.split() if f"--{flag}" not in result.stdout] == []
