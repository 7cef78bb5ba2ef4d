"""Check that the scripts behind the documented numbers run on a tiny model and do what they say."""

import json

import pytest
import torch
from commands import run_here
from dither import dither
from forked import forking
from packed import pack
from safetensors.torch import load_file


def script(name, *arguments):
    """Run scripts/NAME.py. Returns its stdout."""
    with forking():
        done = run_here(name, *arguments)
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
    ours = run_here("llmq.eval", *options).stdout
    assert theirs == ours
    assert theirs.startswith("perplexity ")


def comparison(llama, text_file, results, *options):
    paths = ["--model", llama, "--calibration", text_file, "--text", text_file, "--results", results]
    shape = ["--group-sizes", "32", "--samples", "8", "--sequence-length", "32", "--chunk", "128", "--limit", "2"]
    return script("compare_methods", *paths, *shape, *options)


def test_the_comparison_has_a_line_for_each_setting_and_a_row_for_each_seed(llama, text_file, tmp_path):
    results, table, picture = (tmp_path / name for name in ("rows.jsonl", "table.csv", "kl.png"))
    settings = ["--settings", "plain: --method rtn", "fast: --effort fast --gptq.order natural"]
    options = [*settings, "--bits", "4", "--seeds", "0", "1", "--csv", table, "--plot", picture]
    text = comparison(llama, text_file, results, *options)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == 4
    assert {row["packed_weights"] for row in rows} == {2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)}
    assert "original perplexity" in text
    lines = {tuple(cell.strip() for cell in line.split("|")[1:4]): line for line in text.splitlines() if "±" in line}
    assert set(lines) == {("4", "32", name) for name in ("plain", "fast")}
    kl = [row["kl"] for row in rows if row["name"] == "fast"]
    assert kl[0] != kl[1]  # other windows of the text
    assert f"| {sum(kl) / 2:.4f} ± {abs(kl[0] - kl[1]) / 2:.4f} |" in lines["4", "32", "fast"]
    assert len(table.read_text().splitlines()) == 5
    assert picture.stat().st_size > 10_000
    assert comparison(llama, text_file, results, *options) == text  # nothing is done twice
    assert len(results.read_text().splitlines()) == 4


def test_the_comparison_refuses_rows_made_with_other_flags(llama, text_file, tmp_path):
    results = tmp_path / "rows.jsonl"
    row = {"settings": {}, "name": "plain", "flags": "", "bits": 4, "group_size": 32, "seed": 0}
    results.write_text(json.dumps(row) + "\n")
    with pytest.raises(AssertionError, match="made with other settings; name another file"):
        comparison(llama, text_file, results, "--settings", "plain: --method rtn")


@pytest.mark.parametrize("settings", [["gptq"], ["a: ", "a: --method rtn"], ["a: --bits 3"]])
def test_the_comparison_refuses_what_is_not_one_setting_each(settings, llama, text_file, tmp_path):
    with pytest.raises(AssertionError, match="error: "):
        comparison(llama, text_file, tmp_path / "rows.jsonl", "--settings", *settings)
