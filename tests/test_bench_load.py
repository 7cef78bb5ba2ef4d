"""Check that the script that times loading measures a linear in two checkouts, and a checkpoint."""

import json
import re

from commands import ROOT, run_here
from forked import forking
from packed import pack


def test_each_checkout_has_a_line_of_seconds_and_memory():
    with forking():
        done = run_here(
            "bench_load", "--rows", 64, "--columns", 256, "--runs", 1, "--formats", "awq", "--against", ROOT
        )
    assert done.returncode == 0, done.stderr
    line = r"awq +{} +\d+\.\d{{3}} CPU s +\d+\.\d{{3}} s +{}x +\d+ MiB more, peak +\d+\n"
    assert re.fullmatch(line.format("other", r"1\.00") + line.format("this", r"\d+\.\d\d"), done.stdout)


def test_a_checkpoint_is_loaded_and_measured(llama, tmp_path):
    done = run_here("bench_load", "--measure", pack(llama, tmp_path / "packed"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"cpu", "wall", "peak", "more"}
    assert 0 < found["cpu"] < 60
    assert 0 < found["wall"] < 60
    assert 0 <= found["more"] < found["peak"]
