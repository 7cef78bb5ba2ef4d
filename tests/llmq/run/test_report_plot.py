"""The picture of a run shows what its report says, and no failure to draw it harms a checkpoint."""

import json
import math
from importlib.util import find_spec

import pytest

import llmq
from llmq.checkpoint.output_dir import PICTURE, REPORT
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError, WorkError
from llmq.run import report_plot
from llmq.run.report_plot import figure_of, plot
from llmq.runtime.load import load


def quantize(model, text, output, **options):
    settings = {"calibration": str(text), "samples": 10, "sequence_length": 32, "group_size": 32, "plot": True}
    return llmq.quantize(QuantizeConfig(model=str(model), output=output, **(settings | options)))


def report(resumed=(), error=lambda i: 0.001 * (i + 1)):
    """Of four blocks of two groups each."""
    linears = (["attn.q_proj", "attn.k_proj"], ["mlp.down_proj"])
    groups = [
        {"block": f"model.layers.{i // 2}", "linears": linears[i % 2], "error": error(i), "rtn_error": 2 * error(i)}
        | {"at": 3.0 + i, "peak_memory_bytes": (5 + i % 2) * 10**8, "tokens": 9}
        for i in range(8)
    ]
    seconds = {"total": 12.0, "open": 2.0, "solve": 7.0}
    about = {"config": {"method": "gptq"}, "peak_memory_bytes": 7 * 10**8, "resumed": list(resumed)}
    return about | {"groups": groups, "seconds": seconds}


def test_a_kind_of_group_is_a_line_over_the_blocks_with_a_faint_one_for_rounding_to_nearest():
    lines = figure_of(report()).axes[0].lines
    assert [line.get_label() for line in lines if line.get_label()[0] != "_"] == [
        *("q+k", "down"),
        "rounded to nearest",
    ]
    ours, nearest = lines[0], lines[1]
    assert list(ours.get_xdata()) == [0, 1, 2, 3]
    assert list(ours.get_ydata()) == pytest.approx([0.001, 0.003, 0.005, 0.007])
    assert list(nearest.get_ydata()) == pytest.approx([0.002, 0.006, 0.010, 0.014])
    assert ours.get_color() == nearest.get_color()


def test_bars_are_the_phases_and_what_is_in_none_of_them():
    axes = figure_of(report()).axes[1]
    shown = dict(zip([label.get_text() for label in axes.get_yticklabels()], axes.patches, strict=True))
    assert {name: bar.get_width() for name, bar in shown.items()} == {"solve": 7.0, "other": 3.0, "open": 2.0}


def test_memory_is_a_step_line_in_gigabytes_from_the_start():
    (line,) = figure_of(report()).axes[2].lines
    assert list(line.get_xdata()) == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert list(line.get_ydata()) == pytest.approx([0.5, *[0.5, 0.6] * 4])


@pytest.mark.parametrize(
    ("resumed", "at"),
    [
        (["outside the blocks"], [0.0]),
        (["model.layers.0", "model.layers.2"], [4.0, 8.0]),
        (["model.layers.11"], [10.0]),  # one that was not to be quantized
        (["training"], [10.0]),
    ],
)
def test_a_mark_shows_where_a_run_was_resumed(resumed, at):
    marks = figure_of(report(resumed)).axes[2].lines[1:]
    assert [mark.get_xdata()[0] for mark in marks] == at


@pytest.mark.parametrize("error", [lambda i: 0.0, lambda i: math.nan, lambda i: math.inf if i else 1e-3])
def test_errors_that_no_logarithm_takes_can_be_drawn(error, tmp_path):
    plot(report(error=error), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_report_without_groups_can_be_drawn(tmp_path):
    plot(report(["outside the blocks"]) | {"groups": []}, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_run_is_drawn_beside_its_checkpoint_and_again_when_it_is_done_already(llama, text_file, tmp_path):
    output = quantize(llama, text_file, tmp_path / "out")
    picture = (output / PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    plot(json.loads((output / REPORT).read_text()), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == picture
    (output / PICTURE).unlink()
    quantize(llama, text_file, output, resume=True)
    assert (output / PICTURE).read_bytes() == picture


def test_without_matplotlib_nothing_begins(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(report_plot, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(RequestError, match=r"pip install 'llmq\[plots\]'"):
        quantize(llama, text_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(llama, text_file, tmp_path / "out", plot=False)


def test_a_picture_that_cannot_be_written_harms_no_checkpoint(llama, text_file, tmp_path):
    output = quantize(llama, text_file, tmp_path / "out", plot=False)
    (output / PICTURE).mkdir()
    with pytest.raises(WorkError, match=f"is whole, but {PICTURE} cannot be written"):
        quantize(llama, text_file, output, resume=True)
    load(output, device="cpu")


@pytest.mark.parametrize("measured", [None, 0.2])
def test_a_budget_is_drawn_beside_uniform_bits(measured):
    uniform = {"3": {"stored_bits": 3.25, "kl": 0.3}, "4": {"stored_bits": 4.25, "kl": 0.1}}
    chosen = {"stored_bits": 3.5, "predicted_kl": 0.22, "measured_kl": measured, "uniform": uniform}
    axes = figure_of(report() | {"budget": chosen}).axes[-1]
    points = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
    assert points == [[(3.25, 0.3), (4.25, 0.1)], [(3.5, 0.22)], *([[(3.5, 0.2)]] if measured else [])]
    assert axes.get_yscale() == "log"
