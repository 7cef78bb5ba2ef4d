"""Quantize the demo model, SmolLM2-135M-Instruct, open it with transformers, and ask it a question."""

import copy
import time

import pytest
import torch
from packed import logits, pack, put_dequantized
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmq
from llmq.models.model_source import ModelSource
from llmq.runtime.packed_linear import PackedLinear

pytestmark = [pytest.mark.demo, pytest.mark.together]

PARIS = (
    "Paris is the capital and largest city of France. It stands on the Seine in the north of the country, and has been "
    "one of the great centres of finance, diplomacy, trade, fashion and science of Europe since the seventeenth "
    "century. Its museums, above all the Louvre, are among the most visited in the world. Around eleven million people "
    "live in the region, which produces close to a third of the wealth of the whole country. The city was founded by a "
    "Celtic people, the Parisii, in the third century before our era, and grew into the largest town of Western Europe "
    "in the Middle Ages. Two thousand years later it still is one, and the one that travellers most often mean to see."
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Pack the demo model. Returns (its directory, seconds of processor time)."""
    started = time.process_time()  # not the wall clock, because other tests may run at the same time
    directory = pack("demo", tmp_path_factory.mktemp("demo") / "packed", bits=4, group_size=64)
    return directory, time.process_time() - started


@pytest.fixture(scope="module")
def original():
    """Return the demo model in float32, as llmq reads it."""
    return ModelSource("demo").load_all(torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def ids(demo):
    encoded = AutoTokenizer.from_pretrained(demo[0])(PARIS, return_tensors="pt")["input_ids"]
    assert encoded.shape[1] >= 128
    return encoded


def test_rounding_the_demo_model_takes_less_than_a_minute(demo):
    assert demo[1] < 60


def test_transformers_and_llmq_compute_exactly_what_the_dequantized_model_does(demo, original, ids):
    directory, _ = demo
    expected = logits(put_dequantized(copy.deepcopy(original), directory), ids)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert torch.equal(logits(theirs, ids), expected)
    del theirs
    ours = llmq.load(directory, "cpu")
    assert sum(isinstance(module, PackedLinear) for module in ours.modules()) == 30 * 7
    assert torch.equal(logits(ours, ids), expected)


def test_the_packed_model_knows_the_capital_of_france(demo):
    directory, _ = demo
    model, tokenizer = llmq.load(directory, "cpu"), AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_packing_takes_a_third_of_the_blocks_memory(demo):
    model = llmq.load(demo[0], "cpu")
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    dense = sum(2 * linear.in_features * linear.out_features for linear in linears)
    packed = sum(tensor.nbytes for linear in linears for tensor in linear.state_dict().values())
    # Rows are padded to blocks of 256 inputs: 576 becomes 768, and 1536 stays. A group of 64 has one 4-byte word.
    row_bytes = {576: 768 // 2 + 576 // 64 * 4, 1536: 1536 // 2 + 1536 // 64 * 4}
    assert packed == sum(linear.out_features * row_bytes[linear.in_features] for linear in linears)
    assert packed / dense == 11 / 32
