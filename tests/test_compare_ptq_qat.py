"""The comparison of quantizing after training with training while quantized measures each way in its own process."""

import json

import pytest
from commands import run_here
from compare_ptq_qat import commands_of
from forked import forking

from llmq.core.errors import RequestError


def test_a_way_is_a_name_and_a_program_of_llmq():
    assert commands_of(["a: quantize --method rtn", "b c: train"]) == {"a": "quantize --method rtn", "b c": "train"}
    for wrong in ("quantize", "a: eval", "a: "):
        with pytest.raises(RequestError, match="NAME: PROGRAM FLAGS"):
            commands_of([wrong])


def test_the_table_has_a_row_for_each_way_and_width_and_keeps_finished_ones(llama, text_file, tmp_path):
    paths = ["--model", llama, "--calibration", text_file, "--text", text_file, "--results", tmp_path / "rows.jsonl"]
    shape = ["--group-size", "32", "--samples", "10", "--sequence-length", "32", "--chunk", "128", "--limit", "2"]
    ways = ["--ways", "rtn: quantize --method rtn", "qat: train --learn codes --loss kl --steps 6 --samples 20"]

    def table(*more):
        with forking():
            done = run_here("compare_ptq_qat", *paths, *shape, *ways, "--bits", "4", "2", "--own", "4", *more)
        assert done.returncode == 0, done.stderr
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[4:]]

    rows = table()
    assert [row[:2] for row in rows] == [["4", "rtn"], ["4", "qat"], ["2", "rtn"], ["2", "qat"]]
    assert [row[5] for row in rows] == ["0", "384", "0", "384"]  # 6 steps of 2 sequences of 32 tokens
    kl = [float(row[2]) for row in rows]
    assert kl[1] < kl[0]
    assert kl[3] < kl[2]
    own = (tmp_path / "rows-own-4.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in own] == [["text"]] * 4
    assert table() == rows
    assert table("--results", tmp_path / "again.jsonl", "--outputs", tmp_path / "kept")[0][:4] == rows[0][:4]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.safetensors")}
    assert {path.parent.name for path in written} == {"rtn-4bit", "qat-4bit", "rtn-2bit", "qat-2bit"}
    (tmp_path / "again.jsonl").unlink()
    table("--results", tmp_path / "again.jsonl", "--outputs", tmp_path / "kept")  # goes on from there
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert table("--ways", "rtn: quantize --method rtn", "--plot", tmp_path / "kl.svg") == rows[::2]
    assert {"<!-- rtn -->", "<!-- qat -->"} < set(map(str.strip, (tmp_path / "kl.svg").read_text().splitlines()))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
