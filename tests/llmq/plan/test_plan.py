"""A dry run: what it says, and what it leaves alone."""

import re
from pathlib import Path

import pytest
from commands import run_here
from planned import SMALL, open_run

from llmq.core.config import METHODS
from llmq.plan import lines, plan_of


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_reads_no_weights_writes_nothing_and_says_what_stays_in_float(method, llama, text_file, tmp_path):
    arguments = ("--model", llama, "--output", tmp_path / "out", "--calibration", text_file, *SMALL)
    result = run_here("llmq.quantize", *arguments, "--method", method, "--blocks", "0", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == []
    said = result.stdout
    assert "blocks    2 in the model; 1 are quantized: 0\n" in said
    assert said.count("self_attn.q_proj 64x64 + self_attn.k_proj 32x64 + self_attn.v_proj 32x64, 4 bit") == 1
    for what in ("lm_head.weight (384x64)", "model.embed_tokens.weight", "blocks 1: not among --blocks", "norms"):
        assert what in said
    for what in ("format", "bits", "output", "states", "memory", "disk", "time"):
        assert re.search(rf"^{what} ", said, re.MULTILINE), said
    assert ("looks only at the weights" in said) == (method == "rtn")
    assert "held out" in said or method == "rtn"


def test_text_that_the_model_would_write_is_not_written(llama, tmp_path, unreadable):
    request, run = open_run(llama, "self", tmp_path / "out", dry_run=True)
    said = "\n".join(lines(plan_of(request, run)))
    assert "self: 576 tokens, 64 held out" in said
    assert any(moment.what == "the writing of calibration text" for moment in plan_of(request, run).moments)
    assert not Path(tmp_path / "out").exists()
