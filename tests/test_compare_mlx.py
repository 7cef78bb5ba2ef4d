"""Check the script that compares llmq with mlx_lm.convert, without mlx: all rows are there already."""

import json

import pytest
from compare_methods import CompareConfig, common
from compare_mlx import CompareMlxConfig, compare

from llmq.core.errors import RequestError

KL = {
    ("mlx_lm.convert", 4): 0.5,
    ("mlx_lm.convert", 3): 1.6,
    ("llmq gptq", 4): 0.1,
    ("llmq gptq", 3): 0.3,
}
FLAGS = {"llmq gptq": "--format mlx --no-symmetric"}


def with_rows(directory, **settings):
    config = CompareMlxConfig("valid.txt", "test.txt", directory, bits=(4, 3), results=directory / "rows.jsonl")
    shared = common(CompareConfig(str(directory), "valid.txt", "test.txt")) | settings
    rows = [
        {"settings": shared, "name": name, "flags": FLAGS.get(name, ""), "bits": bits, "group_size": 64, "seed": 0}
        | {"bits_per_weight": bits + 0.5, "kl": kl, "perplexity": 20 + kl, "original_perplexity": 19.0}
        for (name, bits), kl in KL.items()
    ]
    config.results.write_text("\n".join(map(json.dumps, rows)))
    return config


def test_the_table_has_the_best_row_of_each_width_last(tmp_path, capsys):
    compare(with_rows(tmp_path))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "original perplexity 19.000"
    assert [line.split(" | ")[:2] for line in printed[4:]] == [
        ["| 4", "mlx_lm.convert"],
        ["| 4", "llmq gptq"],
        ["| 3", "mlx_lm.convert"],
        ["| 3", "llmq gptq"],
    ]
    assert printed[-1] == "| 3 | llmq gptq | 3.50 | 0.3000 | 20.300 |"


def test_rows_of_other_settings_are_refused(tmp_path):
    with pytest.raises(RequestError, match=r"rows\.jsonl contains rows made with other settings"):
        compare(with_rows(tmp_path, samples=1))
