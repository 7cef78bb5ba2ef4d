"""transformers opens packed checkpoints through llmq, and saves them as they were."""

import copy
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_checkpoints import (
    FOREIGN,
    NORM,
    ROUTES,
    WRITTEN,
    change_config,
    make_checkpoints,
    opened,
    quantization,
    regrouped,
)
from packed import dequantized_model, logits, random_weight, some_tokens
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.transformers_plugin import LlmqConfig, LlmqQuantizer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


def packed_linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def assert_same_tensors(old, new):
    """All packed tensors of one directory lie in another, too, with the same bytes."""
    before, after = (load_file(directory / "model.safetensors") for directory in (old, new))
    packed = Checkpoint(old).packed_names
    assert packed
    for name in packed:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name], after[name]), name
    leaves, expected = ({name.rpartition(".")[2] for name in names} for names in (after, packed))
    assert leaves - {"weight", "bias", "g_idx"} == expected - {"weight", "g_idx"}


@pytest.mark.parametrize("kind", [*WRITTEN, *FOREIGN])
def test_transformers_computes_and_writes_what_llmq_load_does(checkpoints, kind):
    ours, theirs = llmq.load(checkpoints(kind), "cpu", torch.float32), opened(checkpoints(kind))
    assert packed_linears(theirs).keys() == packed_linears(ours).keys()
    assert len(packed_linears(theirs)) == 2 * 7
    assert [name for name, module in theirs.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    for ids in (some_tokens(), some_tokens(1, 5)):
        assert torch.equal(logits(theirs, ids), logits(ours, ids))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(theirs.generate(some_tokens(1, 5), **options), ours.generate(some_tokens(1, 5), **options))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", [*WRITTEN, *FOREIGN])
def test_a_saved_model_is_the_one_that_was_opened(checkpoints, tmp_path, kind, route):
    model = ROUTES[route](checkpoints(kind))
    model.save_pretrained(tmp_path)
    assert_same_tensors(checkpoints(kind), tmp_path)
    if kind in WRITTEN:
        for key in ("quantization_config", "quantization"):  # MLX's second place
            assert quantization(tmp_path, key) == quantization(checkpoints(kind), key)
    else:
        assert quantization(tmp_path)["quant_method"] == "gptq"
    assert torch.equal(logits(llmq.load(tmp_path, "cpu"), some_tokens()), logits(model, some_tokens()))


@pytest.mark.parametrize("route", ROUTES)
def test_stock_transformers_opens_a_saved_model(checkpoints, tmp_path, route):
    ROUTES[route](checkpoints("compressed-tensors")).save_pretrained(tmp_path)
    stock, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(stock.hf_quantizer).__name__ == "CompressedTensorsHfQuantizer"
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(
        logits(stock, some_tokens()), logits(dequantized_model(checkpoints.source, tmp_path), some_tokens())
    )


def test_stock_transformers_refuses_mlx_in_words(checkpoints):
    with pytest.raises(ValueError, match=r"quantization config .* has no `quant_method` attribute"):
        AutoModelForCausalLM.from_pretrained(checkpoints("mlx"))


ALONE = """
import sys
sys.modules |= dict.fromkeys(["compressed_tensors", "gptqmodel", "auto_gptq", "awq", "auto_round", "optimum"])
from hf_checkpoints import opened
from pathlib import Path
for directory in sys.argv[1:]:
    print(opened(Path(directory))(input_ids=__import__("torch").tensor([[5, 6, 7]])).logits.shape)
"""


def test_no_other_quantization_package_is_imported(checkpoints):
    root = Path(__file__).parents[3]
    paths = [str(root / name) for name in (".", "kernels", "tests")]
    kinds = ("compressed-tensors", "gptq", "awq", "auto-round", "quantize_config.json")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *(str(checkpoints(kind)) for kind in kinds)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["torch.Size([1, 3, 384])"] * len(kinds), done.stderr


def test_transformers_knows_the_method():
    assert AUTO_QUANTIZER_MAPPING["llmq"] is LlmqQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["llmq"] is LlmqConfig


def test_the_name_llmq_is_on_no_configuration_that_could_be_written(checkpoints, tmp_path):
    for name, route in ROUTES.items():
        model = route(checkpoints("awq"))
        model.config.save_pretrained(tmp_path / name)
        assert quantization(tmp_path / name) == quantization(checkpoints("awq"))


def test_a_directory_of_several_shards_is_opened_and_saved(checkpoints, tmp_path):
    ours = llmq.load(checkpoints("gptq"), "cpu")
    ours.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    model = opened(tmp_path / "shards", device_map="auto")
    assert torch.equal(logits(model, some_tokens()), logits(ours, some_tokens()))
    model.save_pretrained(tmp_path / "whole")
    assert_same_tensors(checkpoints("gptq"), tmp_path / "whole")


def test_weights_of_another_name_are_found_if_the_configuration_says_it(checkpoints, tmp_path):
    directory = Path(shutil.copytree(checkpoints("quantize_config.json"), tmp_path / "packed"))
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")
    change_config(directory, lambda config: config.update(transformers_weights="gptq_model-4bit-32g.safetensors"))
    expected = logits(llmq.load(directory, "cpu"), some_tokens())
    assert torch.equal(logits(opened(directory), some_tokens()), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_stay_as_they_were_when_the_model_is_cast(checkpoints, tmp_path, dtype):
    for name, route in ROUTES.items():
        route(checkpoints("gptq_v2")).to(dtype).save_pretrained(tmp_path / name)
        assert_same_tensors(checkpoints("gptq_v2"), tmp_path / name)
        assert load_file(tmp_path / name / "model.safetensors")[NORM].dtype == dtype


def test_a_dtype_may_be_asked_for(checkpoints):
    theirs, ours = (f(checkpoints("awq")) for f in (lambda d: opened(d, dtype=torch.bfloat16), ROUTES["llmq"]))
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    exact, rounded = logits(ours, some_tokens()), logits(theirs, some_tokens())
    assert rounded.dtype == torch.bfloat16
    assert 0 < float((rounded.float() - exact).norm() / exact.norm()) < 5e-2


def test_a_copy_of_a_model_can_be_saved(checkpoints, tmp_path):
    model = copy.deepcopy(llmq.load(checkpoints("gptq"), "cpu"))
    model.save_pretrained(tmp_path / "once")
    model.save_pretrained(tmp_path / "twice")
    for name in ("once", "twice"):
        assert_same_tensors(checkpoints("gptq"), tmp_path / name)
        assert quantization(tmp_path / name) == quantization(checkpoints("gptq"))


ROUND_TRIPS = {
    "one group per row": random_weight(48, 96, 1),
    "float16": random_weight(48, 96, 3, 3, symmetric=False),
    "bfloat16": random_weight(48, 96, 3, 2, symmetric=False, dtype=torch.bfloat16),
    "float32": random_weight(48, 96, 3, dtype=torch.float32),
    "equal groups in act order": regrouped(random_weight(48, 96, 3, symmetric=False), [32, 32, 32]),
    "one scale for inputs": replace(random_weight(48, 96, 3), input_scale=torch.tensor([1e-9])),
    "groups of three sizes in act order": regrouped(random_weight(48, 96, 3, 8, symmetric=False), [16, 48, 32]),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_linear_gives_back_the_codes_that_it_was_made_of(case):
    weight = ROUND_TRIPS[case]
    found = PackedLinear.from_codes(weight).to(torch.float16).codes()
    assert found.bits == weight.bits
    for part in ("q", "scale", "zero", "group_of", "input_scale"):
        theirs, ours = getattr(weight, part), getattr(found, part)
        if theirs is None:
            assert ours is None
        else:
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
