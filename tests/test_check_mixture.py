"""Check the script that decides whether what is said of mixtures of experts holds."""

import json
import math

import check_mixture
import compare_methods
import pytest
from check_mixture import MixtureConfig, check

from llmq.core.errors import WorkError

GOOD = {"rtn": 1.0, "routed": 0.4, "layer": 0.5, "all-tokens": 0.4}


def check_rows(directory, kl, seconds=160.0):
    """Check rows of a mixture with 10 times as many weights as the dense model, which takes 10 seconds."""
    config = MixtureConfig(results=directory, mixture=directory, dense=directory)
    for table in check_mixture._comparisons(config).values():
        is_dense = len(table.settings) == 1
        for setting in table.settings:
            name, _, flags = setting.partition(": ")
            row = {"settings": compare_methods.common(table), "name": name, "flags": flags, "bits": 4, "seed": 0}
            row |= {"group_size": 64, "kl": 0.1 if is_dense else kl[name], "perplexity": 20.0, "layer_error": 0.1}
            row |= {"seconds": {"total": 10.0 if is_dense else seconds}, "packed_weights": 10**6 if is_dense else 10**7}
            row |= {"peak_memory_bytes": 10**9, "original_perplexity": 19.0}
            with table.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    check(config)


def test_rows_that_satisfy_every_claim_pass(tmp_path, capsys):
    check_rows(tmp_path, GOOD)
    printed = capsys.readouterr().out
    assert printed.count("\nholds ") == 4
    assert "holds     1.600 <= 1.6      seconds per million weights: 16.000 / 10.000 of the dense model" in printed
    assert "| 4 | 64 | all-tokens | 0.4000 |" in printed


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"kl": GOOD | {"rtn": 0.99}}, "KL of gptq / of rtn"),
        ({"kl": GOOD | {"layer": 0.39}}, "with the layer's tokens for every expert"),
        ({"kl": GOOD | {"all-tokens": math.nan}}, "with all tokens sent to all experts"),
        ({"kl": GOOD, "seconds": 161.0}, "seconds per million weights"),
    ],
)
def test_a_claim_that_does_not_hold_is_named_and_is_an_error(changes, claim, tmp_path, capsys):
    with pytest.raises(WorkError, match="1 claims do not hold"):
        check_rows(tmp_path, **changes)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS"))
    assert claim in line
