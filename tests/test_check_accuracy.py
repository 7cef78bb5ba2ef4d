"""Check the script that decides whether the documented accuracy holds."""

import json
import math
import shlex
from pathlib import Path

import check_accuracy
import compare_methods
import pytest
import tyro
from check_accuracy import CheckConfig, Rows, check

from llmq.core.config import QuantizeConfig
from llmq.core.errors import WorkError

CONFIG = CheckConfig("valid.txt", "test.txt", results=Path("rows"), dithered=Path("model"))


def test_every_setting_is_one_that_quantize_takes():
    tables = check_accuracy._tables(CONFIG).values()
    asked = {
        (setting.partition(":")[2], str(bits)) for table in tables for setting in table.settings for bits in table.bits
    }
    for flags, bits in asked:
        tyro.cli(QuantizeConfig, args=["--model", "m", "--output", "o", "--bits", bits, *shlex.split(flags)])


def write_rows(directory, kl, seconds=100.0):
    """Write all rows of all tables as if they were measured."""
    config = CheckConfig("valid.txt", "test.txt", results=directory, dithered=directory)
    for table in check_accuracy._tables(config).values():
        lines = []
        for setting in table.settings:
            name, _, flags = setting.partition(": ")
            for bits in table.bits:
                for seed in table.seeds:
                    row = {"settings": compare_methods.common(table), "name": name, "flags": flags}
                    row |= {"bits": bits, "group_size": 64, "seed": seed, "kl": kl(name, bits), "perplexity": 20.0}
                    row |= {"layer_error": 0.1, "original_perplexity": 19.0, "peak_memory_bytes": 10**9}
                    row |= {"seconds": {"total": seconds, "forward": 40.0, "statistics": 20.0}, "bits_per_weight": bits}
                    lines.append(json.dumps(row))
        with table.results.open("a") as file:  # some tables share a file
            file.write("\n".join(lines) + "\n")
    return config


def good(name, bits):
    """Return values that satisfy every claim."""
    value = {"common": 1.0, "plain": 1.2, "fast": 0.5, "best": 0.2, "tuned": 0.1}.get(name)
    value = value if value is not None else 0.25 if name in ("normal", "normal, awq first", "normal, 2 passes") else 0.3
    return value * {4: 0.3, 3: 1.0, 2: 3.0}[bits]


def test_measured_rows_that_satisfy_every_claim_pass(tmp_path, capsys):
    check(write_rows(tmp_path, good))
    printed = capsys.readouterr().out
    assert "FAILS" not in printed
    assert "holds     0.250 <= 0.5      KL, 4 bit, normal / common" in printed
    assert "| 3 | 64 | normal | 0.2500 ± 0.0000 |" in printed


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ("normal - matching", "KL of normal / of normal without one improvement: normal - matching"),
        ("normal, mse grid", "KL of normal / of normal with an unused option: normal, mse grid"),
    ],
)
def test_a_claim_that_does_not_hold_is_named_and_is_an_error(changed, claim, tmp_path, capsys):
    config = write_rows(tmp_path, lambda name, bits: 0.1 if name == changed else good(name, bits))
    with pytest.raises(WorkError, match="1 claims do not hold"):
        check(config)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS"))
    assert claim in line


def test_what_could_not_be_computed_does_not_hold(tmp_path, capsys):
    with pytest.raises(WorkError):
        check(write_rows(tmp_path, lambda name, bits: math.nan if name == "tuned" else good(name, bits)))
    assert "FAILS       nan <= 0.09" in capsys.readouterr().out


def test_seconds_count(tmp_path, capsys):
    with pytest.raises(WorkError):
        check(write_rows(tmp_path, good, seconds=200.0))
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS")]
    assert len(failed) == 2
    assert any("seconds, demo model, 4 bit, fast" in line for line in failed)
    assert any("normal / two forwards and statistics (60 s)" in line for line in failed)


def test_a_gain_is_the_mean_over_bits_of_factors():
    rows = [
        {"name": n, "bits": b, "kl": k, "seed": 0} for n, b, k in (("a", 4, 1), ("b", 4, 8), ("a", 2, 3), ("b", 2, 6))
    ]
    assert Rows(rows).gain("a", "b") == pytest.approx(4.0)
