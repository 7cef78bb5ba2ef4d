"""The scripts behind the documented numbers run, on a tiny model, and do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dither import dither
from packed import pack
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


def script(name, *arguments, cwd=ROOT):
    """Run scripts/NAME.py and return its stdout."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dithering_moves_each_weight_by_at_most_half_a_cell_of_its_group():
    w = torch.randn(9, 96, generator=torch.Generator().manual_seed(0))
    moved = dither(w, torch.Generator().manual_seed(1)) - w
    groups = w.view(9, 3, 32)
    cell = (groups.amax(-1) - groups.amin(-1)) / 15
    relative = moved.view(9, 3, 32) / cell[..., None]
    assert relative.abs().max() <= 0.5001
    assert relative.abs().max() > 0.48  # the whole cell is used …
    assert abs(float(relative.mean())) < 0.05  # … evenly
    assert abs(float(relative.var()) - 1 / 12) < 0.01


def test_a_dithered_model_differs_in_its_block_linears_only(llama, tmp_path):
    script("dither", "--model", llama, "--output", tmp_path / "dithered")
    before, after = (load_file(path / "model.safetensors") for path in (llama, tmp_path / "dithered"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers." in name and before[name].ndim == 2}


def test_transformers_and_llmq_agree_on_the_perplexity_of_a_checkpoint(llama, text_file, tmp_path):
    checkpoint = pack(llama, tmp_path / "packed")
    options = ["--model", str(checkpoint), "--text", str(text_file), "--sequence-length", "128", "--limit", "3"]
    theirs = script("eval_perplexity", *options)
    ours = subprocess.run(
        [sys.executable, "-m", "llmq.eval", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    ).stdout
    assert theirs == ours
    assert theirs.startswith("perplexity ")


@pytest.mark.parametrize("resumed", [False, True])
def test_the_comparison_prints_a_row_for_each_method_and_keeps_finished_ones(llama, text_file, tmp_path, resumed):
    results = tmp_path / "rows.jsonl"
    if resumed:
        settings = {"model": llama.name, "calibration": "text.txt", "text": "text.txt", "group_size": 32}
        settings |= {"samples": 64, "sequence_length": 512, "chunk": 128, "limit": 2}
        row = {"settings": settings, "bits": 4, "grid": "symmetric", "method": "rtn", "perplexity": 123.0, "kl": 1.0}
        row |= {"seconds": {"total": 1.0, "forward": 1.0}, "peak_memory_bytes": 10**9}
        results.write_text(json.dumps(row) + "\n")
    options = ["--model", llama, "--calibration", text_file, "--text", text_file, "--results", results]
    options += ["--methods", "rtn", "--bits", "4", "--grids", "symmetric", "--group-size", "32"]
    table = script("compare_methods", *options, "--chunk", "128", "--limit", "2")
    assert len(results.read_text().splitlines()) == 1
    assert ("| 4 | symmetric | rtn | 123.000 | 1.0000 |" in table) == resumed
    assert "original perplexity" in table
