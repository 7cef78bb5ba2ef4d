"""Check that the scripts that time generation and calls measure what they name."""

import re

from commands import run_here
from forked import forking
from packed import pack


def measured(name, *arguments):
    """Run a script; returns its lines."""
    with forking():
        done = run_here(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_each_loop_has_a_line_and_both_loops_write_the_same(llama, tmp_path):
    checkpoint = pack(llama, tmp_path / "packed")
    options = ["--packed", checkpoint, "--original", llama, "--tokens", "6", "--runs", "1", "--prompt-tokens", "9"]
    *lines, last = measured("bench_generate", *options)
    names = ["original, bf16", "original, float32", "packed", "packed, transformers' loop"]
    number = r" +[\d.]+"
    for name, line in zip(names, lines, strict=True):
        assert re.match(rf"{name} +prompt{number} tokens/s{number} tokens/s{number}x   ready in{number} s   \(", line)
        if "transformers" not in name:
            assert "ready in  0.00" not in line  # each model has steps of its own
    assert last == "both loops of the packed model wrote the same text"


def test_a_call_of_a_packed_linear_is_cheaper_than_one_of_an_operator():
    lines = measured("bench_calls", "--calls", "50")
    cost = {
        name.strip(): float(us) for name, us in (re.fullmatch(r"(.+?) +([\d.]+) us a call", x).groups() for x in lines)
    }
    assert list(cost) == ["nn.Linear", "PackedLinear, CPU", "PackedLinear, GPU", "as an operator"]
    assert 0 < cost["PackedLinear, CPU"] < cost["as an operator"]
