"""A budget is kept, spent where it helps most, and told."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small_runs import run, small_config
from tiny import save_tiny

import llmq
from llmq.checkpoint.describe import describe
from llmq.checkpoint.output_dir import REPORT, unfinished_work
from llmq.core.distributed import ALONE
from llmq.core.errors import RequestError
from llmq.run import bit_budget
from llmq.run.bit_budget import ERRORS, choose, table
from llmq.run.block_quantizer import Run
from llmq.run.prepare import open_request
from llmq.run.sensitivity import Unit


def size_of(directory):
    """What a user counts: all files but llmq's reports."""
    return sum(path.stat().st_size for path in directory.rglob("*") if not path.name.startswith("llmq_"))


@pytest.fixture
def prepared(llama, text_file, tmp_path):
    """Make a run of a request."""

    def make(**options):
        config = small_config(llama, text_file, tmp_path / "out", **options)
        request = open_request(config, torch.device("cpu"), ALONE, progress=False)
        return Run(config, request.source, request.compute.device, request.clock)

    return make


def units_of(losses):
    """Of two blocks of a Llama: q+k+v, o, gate+up, down."""
    kinds = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
    names = [
        tuple(f"model.layers.{block}.{'self_attn' if kind[0] in 'qo' else 'mlp'}.{name}_proj" for name in kind)
        for block in range(2)
        for kind in kinds
    ]
    return [Unit(*pair) for pair in zip(names, losses, strict=True)]


def test_the_unit_that_loses_most_for_its_size_gets_the_most_bits(prepared):
    choice = choose(prepared(budget=4.0, widths=(3, 4)), units_of([1e-3] * 5 + [1.0] + [1e-3] * 2))
    assert choice.bits["model.layers.1.self_attn.o_proj"] == 4
    assert choice.average <= 4.0
    assert choice.predicted == pytest.approx(
        sum(unit.loss * ERRORS[choice.bits[unit.linears[0]]] for unit in choice.units)
    )
    assert choice.uniform[3][1] == pytest.approx(1.007)
    assert choice.uniform[4][0] == pytest.approx(4 + 16 / 32 + 14 * 128 / 61440)  # two int64 of shape for each linear


def test_uniform_bits_are_what_a_budget_of_their_size_chooses_if_all_weights_count_alike(prepared):
    sizes = [64 * 128, 64 * 64, 64 * 192, 64 * 96] * 2
    made = prepared(budget=4.53)
    assert set(choose(made, units_of([1e-6 * size for size in sizes])).bits.values()) == {4}


def test_layers_that_the_user_names_keep_their_bits(prepared):
    choice = choose(prepared(budget=4.0, layer_bits=("down_proj=8",), widths=(2, 3, 4)), units_of([0.1] * 8))
    assert {bits for name, bits in choice.bits.items() if name.endswith("down_proj")} == {8}
    assert {bits for name, bits in choice.bits.items() if not name.endswith("down_proj")} <= {2, 3}
    assert choice.average <= 4.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 2.2}, "the layers take at least 2.53 bits per weight; got a budget of 2.2"),
        ({"budget": 4.0, "widths": (4, 8)}, "at least 4.53 bits"),
        ({"size": "100KB"}, r"at least 0\.233 MB, 0\.214 MB of them not quantized; got a size of 0\.100 MB"),
    ],
    ids=str,
)
def test_a_budget_that_nothing_fits_into_is_refused_before_anything_is_measured(
    options, said, llama, text_file, tmp_path, prepared, monkeypatch
):
    with pytest.raises(RequestError, match=said):
        choose(prepared(**options), units_of([0.1] * 8))
    monkeypatch.setattr(bit_budget, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(RequestError, match=said):
        run(llama, text_file, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def interrupted(config, monkeypatch, block="1"):
    """Let a run be killed in one block."""
    quantize_block = Run.quantize_block

    def killed(self, one, show):
        if one.name.endswith(block):
            raise KeyboardInterrupt
        return quantize_block(self, one, show)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "quantize_block", killed)
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(config)
    return unfinished_work(config.output) / "losses.json"


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "mlx"])
def test_a_checkpoint_is_not_larger_than_asked_for_and_hardly_smaller(form, llama, text_file, tmp_path):
    least = run(llama, text_file, tmp_path / "least", bits=2, format=form)
    most = run(llama, text_file, tmp_path / "most", bits=8, format=form)
    asked = (size_of(least) + size_of(most)) // 2
    output = run(llama, text_file, tmp_path / "out", format=form, size=str(asked))
    assert 0.97 * asked < size_of(output) <= asked
    assert len(describe(output)["bits"]) > 1


def test_the_average_is_kept_and_the_report_tells_what_was_chosen_and_lost(deep_llama, text_file, tmp_path):
    output = run(deep_llama, text_file, tmp_path / "out", budget=3.8)
    about, budget = describe(output), json.loads((output / REPORT).read_text())["budget"]
    assert about["bits_per_packed_weight"] == pytest.approx(budget["stored_bits"])
    assert 3.7 < budget["stored_bits"] <= 3.8
    bits = {name: unit["bits"] for unit in budget["units"] for name in unit["linears"]}
    assert bits == {layer["name"]: layer["bits"] for layer in about["layers"]}
    assert sum(about["weights_by_bits"].values()) == about["packed_weights"]
    assert budget["predicted_kl"] == pytest.approx(budget["measured_kl"], rel=0.5)


def test_a_dry_run_prints_the_table_and_writes_nothing(llama, text_file, tmp_path, capsys):
    run(llama, text_file, tmp_path / "out", budget=3.8, dry_run=True)
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    for words in ("q_proj+k_proj+v_proj", "predicted KL", "all 4 bit: 4.529 stored bits", "bits      3."):
        assert words in said


@pytest.mark.parametrize("block", ["0", "1"])
def test_a_resumed_run_measures_nothing_again(block, llama, text_file, tmp_path, monkeypatch):
    config = small_config(llama, text_file, tmp_path / "out", budget=3.8)
    whole, measured, measure = llmq.quantize(replace(config, output=tmp_path / "whole")), [], bit_budget.measure

    def spy(*arguments):
        measured.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(bit_budget, "measure", spy)
    interrupted(config, monkeypatch, block)
    llmq.quantize(replace(config, resume=True))
    assert len(measured) == 1
    assert (config.output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(RequestError, match=r"config\.budget: 3\.8, now 3\.9"):
        llmq.quantize(replace(config, resume=True, budget=3.9))


def test_the_table_counts_units_by_kind_and_bits(prepared):
    lines = list(table(choose(prepared(budget=4.0, widths=(3, 4)), units_of([1e-3] * 5 + [1.0] + [1e-3] * 2))))
    assert lines[0].split()[-4:] == ["3", "bit", "4", "bit"]
    assert next(line for line in lines if line.split()[0] == "o_proj").split()[:2] == ["o_proj", "1.0010"]


DAMAGES = {
    "cut": lambda units: json.dumps(units)[:-9],
    "no units": lambda _: "[]",
    "no text": lambda _: "\x00",
    "other linears": lambda units: json.dumps([unit | {"linears": ["a"]} for unit in units]),
    "not a number": lambda units: json.dumps([unit | {"loss": math.nan} for unit in units]),
    "below 0": lambda units: json.dumps([unit | {"loss": -1.0} for unit in units]),
    "half of them": lambda units: json.dumps(units[:4]),
}


@pytest.mark.parametrize("block", ["0", "1"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_losses_are_measured_again_unless_blocks_have_bits_already(
    damage, block, llama, text_file, tmp_path, monkeypatch
):
    config = small_config(llama, text_file, tmp_path / "out", budget=3.8)
    path = interrupted(config, monkeypatch, block)
    path.write_text(DAMAGES[damage](json.loads(path.read_text())))
    if block == "0":
        llmq.quantize(replace(config, resume=True))
        assert json.loads((config.output / REPORT).read_text())["budget"]["predicted_kl"] > 0
    else:
        with pytest.raises(RequestError, match=r"losses\.json is damaged.*--overwrite"):
            llmq.quantize(replace(config, resume=True))


def test_other_losses_cannot_give_later_blocks_bits_that_break_the_budget(llama, text_file, tmp_path, monkeypatch):
    config = small_config(llama, text_file, tmp_path / "out", budget=3.8)
    path = interrupted(config, monkeypatch)
    units = json.loads(path.read_text())
    path.write_text(json.dumps([unit | {"loss": unit["loss"] * 1000**i} for i, unit in enumerate(units)]))
    with pytest.raises(RequestError, match=r"got \d bit in the interrupted run, now \d"):
        llmq.quantize(replace(config, resume=True))


def test_what_was_measured_at_the_end_survives_an_interruption_after_it(llama, text_file, tmp_path, monkeypatch):
    config = small_config(llama, text_file, tmp_path / "out", budget=3.8)
    with monkeypatch.context() as patch:
        patch.setattr("llmq.pipeline.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            llmq.quantize(config)
    llmq.quantize(replace(config, resume=True))
    assert json.loads((config.output / REPORT).read_text())["budget"]["measured_kl"] > 0


def test_a_refused_budget_leaves_the_checkpoint_that_it_would_replace(llama, text_file, tmp_path):
    output = run(llama, text_file, tmp_path / "out")
    before = (output / "model.safetensors").read_bytes()
    with pytest.raises(RequestError, match=r"at least 2\.53 bits"):
        run(llama, text_file, output, budget=2.2, overwrite=True)
    assert (output / "model.safetensors").read_bytes() == before


def test_a_budget_that_suffices_for_all_is_spent_even_where_no_loss_was_seen(prepared):
    assert set(choose(prepared(budget=16.0), units_of([0.0] * 8)).bits.values()) == {8}
    assert set(choose(prepared(budget=16.0), units_of([0.1] * 7 + [0.0])).bits.values()) == {8}


def test_linears_without_a_loss_count_as_much_as_others_of_their_size(prepared):
    sizes = [64 * 128, 64 * 64, 64 * 192, 64 * 96] * 2
    made = prepared(budget=4.53)
    choice = choose(made, units_of([1e-6 * size for size in sizes[:-1]] + [None]))
    assert set(choice.bits.values()) == {4}
    assert "the text does not run 1 of 8" in made.report.notes[-1]["note"]


@pytest.mark.parametrize("names", [("k_proj=4",), ("q_proj=4", "k_proj=3", "v_proj=4")])
def test_a_part_of_what_shares_its_bits_cannot_be_named_alone(names, llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(bit_budget, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(RequestError, match=r"layer bits: .*q_proj"):
        run(llama, text_file, tmp_path / "out", budget=3.8, layer_bits=names)


def test_what_no_allowed_width_fits_stays_in_float(text_file, tmp_path):
    """264 outputs are no multiple of 32, which 3 bits need. The input of down_proj is none, either."""
    model = save_tiny(tmp_path / "model", "llama-gqa", intermediate_size=264)
    three = describe(run(model, text_file, tmp_path / "three", budget=3.8, widths=(3,)))
    both = describe(run(model, text_file, tmp_path / "both", budget=4.5, widths=(3, 4)))
    assert {layer["name"].rpartition(".")[2] for layer in three["layers"]} == {f"{name}_proj" for name in "qkvo"}
    assert {layer["bits"] for layer in both["layers"] if layer["name"].endswith("gate_proj")} == {4}
