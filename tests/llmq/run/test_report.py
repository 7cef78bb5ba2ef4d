"""The report says all that happened, as JSON for tools and as a short text for people."""

import json

import pytest
import torch
from commands import run_here
from packed import pack
from problems import correlated_inputs, make_problem
from small_runs import run
from tiny import save_tiny, tiny_model

from llmq.algorithms import rtn
from llmq.checkpoint.output_dir import REPORT
from llmq.core.config import QuantizeConfig
from llmq.core.timing import Clock
from llmq.models.block_structure import Expert, Group
from llmq.models.packed_share import PackedShare
from llmq.models.untrusted_files import read_json
from llmq.run.report import Report


def test_the_report_tells_the_whole_story(tmp_path, llama, text_file):
    report = json.loads((run(llama, text_file, tmp_path / "out", group_size=128) / REPORT).read_text())
    assert set(report["seconds"]) >= {"total", "forward", "statistics", "solve", "write"}
    assert report["config"]["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["peak_memory_bytes"] > 1e8
    assert {"where": "model", "note": "group size 128 does not divide every layer: using 32"} in report["notes"]
    for group in report["groups"]:
        assert group["damping"] == 0.05
        assert group["tokens"] == 18 * 32
        assert 0 < group["error"] < 1


def test_effort_best_reports_what_it_kept(tmp_path, llama, text_file):
    kept = {}
    for effort in ("normal", "best"):
        report = json.loads((run(llama, text_file, tmp_path / effort, effort=effort) / REPORT).read_text())
        kept[effort] = {step for group in report["groups"] for step in group["kept"]}
    assert kept == {"normal": set(), "best": {"descent", "scale refit"}}


@pytest.fixture
def report(tmp_path):
    return Report(QuantizeConfig("demo", tmp_path), Clock())


def entry(block, error):
    return {"block": block, "linears": ["mlp.gate_proj", "mlp.up_proj"], "error": error, "rtn_error": 2 * error}


def test_the_summary_names_the_five_worst_layers_and_the_first_notes(report, capsys, tmp_path):
    for i, error in enumerate((0.1, 0.7, 0.3, 0.5, 0.2, 0.6)):
        report.add(entry(f"model.layers.{i}", error) | {"tokens": 9})
    report.note("model", [f"note {i}" for i in range(7)])
    report.distilled, report.packed = (1.25, 0.5), PackedShare(0.25, {"o_proj": 0.75})
    report.show(tmp_path / "out")
    said = capsys.readouterr().err
    layers = [line.split()[:4] for line in said.splitlines() if line.startswith("  model")]
    assert layers[0] == ["model.layers.1", "gate_proj+up_proj", "7.00e-01", "1.40e+00"]
    assert [layer[0][-1] for layer in layers] == ["1", "5", "3", "2", "4"]
    assert "worst layers by relative held-out output error" in said
    assert [line for line in said.splitlines() if line.startswith("note")] == [
        f"note: model: note {i}" for i in range(5)
    ]
    assert "… and 2 more notes in the report" in said
    assert "KL to the original on held-out text 1.2500, after training 0.5000" in said
    assert "\nwarning: only 25.0% of the blocks' matmul weights are packed; in float: o_proj 75%\n" in said
    assert said.endswith(f"wrote {tmp_path / 'out'}\n")


def test_an_entry_notes_rows_that_were_dropped_and_is_told_once_it_is_final(tmp_path):
    told = []
    report = Report(QuantizeConfig("demo", tmp_path), Clock(), told.append)
    problem = make_problem(correlated_inputs())
    problem.statistics.dropped = 3
    linears = ("self_attn.q_proj", "self_attn.k_proj")
    made = report.group("model.layers.0", Group(linears), (0.25, 0.5), rtn.solve(problem), problem.statistics)
    note = "3 token rows with NaN or infinity left out"
    assert report.notes == [{"where": "model.layers.0.q_proj+k_proj", "note": note}]
    assert (made["error"], made["rtn_error"], made["dropped_rows"]) == (0.25, 0.5, 3)
    assert told == report.groups == []
    report.add(made)
    assert told == report.groups
    assert told[0].items() > made.items()
    assert told[0]["peak_memory_bytes"] > 1e6
    assert json.loads(json.dumps(report.to_json()))["groups"] == told


def test_tokens_of_experts_are_told_and_one_that_saw_none_is_noted(report, capsys, tmp_path):
    problem = make_problem(correlated_inputs())
    for number, tokens in enumerate((0, 40, 7)):
        for linears in (("gate_proj", "up_proj"), ("down_proj",)):
            group = Group(
                tuple(f"mlp.experts.{number}.{name}" for name in linears), expert=Expert("mlp.experts", number)
            )
            problem.statistics.tokens, problem.statistics.borrowed = tokens, 0.5
            report.add(report.group("model.layers.0", group, (0.25, 0.5), rtn.solve(problem), problem.statistics))
    note = "no token was routed to this expert: it is rounded for the tokens of all experts"
    assert report.notes == [{"where": "model.layers.0.0.gate_proj+up_proj", "note": note}]
    assert [(entry["expert"], entry["tokens"], entry["borrowed"]) for entry in report.groups[::2]] == [
        (0, 0, 0.5),
        (1, 40, 0.5),
        (2, 7, 0.5),
    ]
    report.show(tmp_path / "out")
    said = capsys.readouterr().err
    assert "tokens per expert: 0 to 40, half of them above 7; 1 of 3 experts saw none" in said
    assert "model.layers.0 1.down_proj" in said


def test_the_share_of_packed_weights_is_told_and_a_small_one_is_a_warning(llama, tmp_path):
    """Weights that are no linears of a packable size stay in float: those of the MLP here."""
    whole = read_json(pack(llama, tmp_path / "whole"), REPORT)
    assert (whole["packed_share"], whole["in_float"]) == (1, {})
    assert whole["packed"] == "100.0% of the blocks' matmul weights are packed"
    odd = save_tiny(tmp_path / "odd", intermediate_size=104)
    report = read_json(pack(odd, tmp_path / "some"), REPORT)
    block = tiny_model("llama-gqa", intermediate_size=104).model.layers[0]
    sizes = {name: p.numel() for name, p in block.named_parameters() if p.ndim == 2}
    packed = sum(size for name, size in sizes.items() if "self_attn" in name)
    assert report["packed_share"] == pytest.approx(packed / sum(sizes.values()))
    kinds = "mlp.gate_proj 21%, mlp.up_proj 21%, mlp.down_proj 21%"
    warning = f"warning: only 38.1% of the blocks' matmul weights are packed; in float: {kinds}"
    assert report["packed"] == warning
    for command in ("llmq.inspect", "llmq.verify"):
        assert warning + "\n" in run_here(command, tmp_path / "some").stdout


def test_a_tokenizer_that_does_not_open_in_the_result_is_noted(tmp_path):
    source = save_tiny(tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    report = read_json(pack(source, tmp_path / "out"), REPORT)
    assert any("the tokenizer of the result cannot be opened" in entry["note"] for entry in report["notes"])
