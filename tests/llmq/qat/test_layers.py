import json

import pytest
from small_runs import run

from llmq.checkpoint.output_dir import REPORT
from llmq.core.errors import RequestError
from llmq.qat.layers import chosen_layers


@pytest.fixture(scope="module")
def report(llama, text_file, tmp_path_factory):
    return json.loads((run(llama, text_file, tmp_path_factory.mktemp("packed") / "out", bits=2) / REPORT).read_text())


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NAMES = [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP)]
SIZES = {f"model.layers.{i}.{name}": 1000 for i in range(2) for name in NAMES}


def test_without_a_wish_all_are_trained():
    assert chosen_layers("", SIZES, {}) == set(SIZES)


def test_names_and_patterns_choose_and_a_wrong_one_is_refused():
    chosen = chosen_layers("down_proj, layers.0.self_attn.*", SIZES, {})
    assert chosen == {name for name in SIZES if "down_proj" in name or "0.self_attn" in name}
    with pytest.raises(RequestError, match="no packed layer is called 'down'"):
        chosen_layers("down", SIZES, {})


def test_the_worst_are_those_with_the_largest_errors_up_to_a_share_of_the_weights(report):
    groups = sorted(report["groups"], key=lambda group: -group["error"])
    first = {f"{groups[0]['block']}.{name}" for name in groups[0]["linears"]}
    assert chosen_layers("worst:0.1%", SIZES, report) == first
    half = chosen_layers("worst:50%", SIZES, report)
    assert first < half
    assert len(half) <= 7
    assert chosen_layers("worst:100%", SIZES, report) == set(SIZES)


def test_without_errors_in_a_report_the_worst_are_not_known():
    with pytest.raises(RequestError, match="name the layers instead"):
        chosen_layers("worst:20%", SIZES, {})
