"""Packed experts that run together compute what they compute one after the other. The kernel's reference stands in."""

import copy
import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixtures import Mixtures, become_act_order, stored
from packed import logits, some_tokens

import llmq
from llmq.models.experts import layouts, run_experts
from llmq.runtime import packed_experts
from llmq.runtime.packed_experts import waits_for_gpu
from llmq.runtime.packed_linear import PackedLinear

# Biases and interleaved gates; no gate; scores before the experts; scores after, beside dense layers.
NAMES = ["gpt_oss", "nemotron_h", "llama4_text", "mixtral", "gemma4_text@moe"]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    return Mixtures(tmp_path_factory.mktemp("mixtures"))


@pytest.fixture
def together(monkeypatch):
    """As if there were kernels for the CPU."""
    monkeypatch.setattr(packed_experts, "takes", lambda X: True)


def forwards(model):
    return [model.get_submodule(name).forward for name in layouts(model)]


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.std()))


@pytest.mark.parametrize("name", NAMES)
def test_experts_compute_the_same_together(mixtures, together, monkeypatch, name):
    model = llmq.load(mixtures(name), "cpu", torch.float32)
    assert forwards(model)
    assert all(forward.stacks for forward in forwards(model))
    with monkeypatch.context() as patch:
        patch.setattr(packed_experts, "run_experts", None)  # nothing runs one after the other
        grouped = logits(model, some_tokens())
        one = logits(model, some_tokens(1, 1))
    monkeypatch.setattr(packed_experts, "takes", lambda X: False)
    monkeypatch.setattr(packed_experts, "routed_linear", None)
    assert_close(grouped, logits(model, some_tokens()))
    assert_close(one, logits(model, some_tokens(1, 1)))


def test_experts_whose_inputs_have_an_order_of_their_own_run_together(mixtures, together, monkeypatch, tmp_path):
    directory = become_act_order(Path(shutil.copytree(mixtures("mixtral", format="gptq"), tmp_path / "packed")))
    model = llmq.load(directory, "cpu", torch.float32)
    assert all(each.weights.permutation is not None for forward in forwards(model) for each in forward.stacks)
    grouped = logits(model, some_tokens())
    monkeypatch.setattr(packed_experts, "takes", lambda X: False)
    assert_close(grouped, logits(model, some_tokens()))


def storages(module):
    return {buffer.untyped_storage().data_ptr() for buffer in module.buffers() if buffer.dtype == torch.int16}


def test_words_are_in_memory_once_and_are_saved_by_their_names(mixtures, together, tmp_path):
    directory = mixtures("mixtral")
    model = llmq.load(directory, "cpu", torch.float32)
    for name in layouts(model):
        module = model.get_submodule(name)
        stacks = {array.untyped_storage().data_ptr() for each in module.forward.stacks for array in each.weights.words}
        assert storages(module) == stacks
        held = {linear._packed.words[0].untyped_storage().data_ptr() for linear in module.get_submodule("0").children()}
        assert held <= stacks
    model.save_pretrained(tmp_path)
    assert stored(tmp_path) == stored(directory)


def test_a_stack_is_made_again_after_its_weights_changed(mixtures, together, monkeypatch):
    model = llmq.load(mixtures("mixtral"), "cpu", torch.float32)
    for assign in (False, True):
        for forward in forwards(model):
            assert forward.stacks is not None
        state = {name: tensor.roll(1, -1) if "grid" in name else tensor for name, tensor in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)  # other scales
        assert all(forward._stacks is None for forward in forwards(model))
        grouped = logits(model, some_tokens())
        with monkeypatch.context() as patch:
            patch.setattr(packed_experts, "takes", lambda X: False)
            assert_close(grouped, logits(model, some_tokens()))
    model.to("cpu")
    assert all(forward._stacks is None for forward in forwards(model))


def test_a_stack_is_made_again_after_accelerate_replaced_a_buffer(mixtures, together):
    model = llmq.load(mixtures("mixtral"), "cpu", torch.float32)
    (module, *_), expected = [model.get_submodule(name) for name in layouts(model)], logits(model, some_tokens())
    module.get_submodule("0").up_proj._buffers["words0"] = module.get_submodule("0").up_proj.words0.clone()
    made = module.forward._stacks
    assert torch.equal(logits(model, some_tokens()), expected)
    assert module.forward._stacks is not made
    assert len(storages(module)) == 2


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_stacks_of_its_own(mixtures, together, how):
    model = llmq.load(mixtures("mixtral"), "cpu", torch.float32)
    expected = logits(model, some_tokens())
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert all(forward.module is not mine.module for forward, mine in zip(forwards(twin), forwards(model), strict=True))
    assert torch.equal(logits(twin, some_tokens()), expected)
    name = next(iter(layouts(model)))
    assert storages(twin.get_submodule(name)).isdisjoint(storages(model.get_submodule(name)))


def in_8_bits(name, weight, bias):
    """One expert of a block in more bits than the others; its codes stay."""
    return PackedLinear.from_codes(replace(weight, bits=8) if ".experts.1." in name else weight, bias)


def test_experts_run_one_after_the_other_where_they_must(mixtures, together, monkeypatch):
    monkeypatch.setattr(packed_experts, "routed_linear", None)
    expected = logits(llmq.load(mixtures("mixtral"), "cpu", torch.float32, make_linear=in_8_bits), some_tokens())
    monkeypatch.setattr(packed_experts, "takes", lambda X: False)
    model = llmq.load(mixtures("mixtral"), "cpu", torch.float32)
    assert_close(expected, logits(model, some_tokens()))
    in_float = llmq.load(mixtures("mixtral", blocks="1"), "cpu", torch.float32)
    assert [forward.stacks is None for forward in forwards(in_float)] == [True, False]
    assert waits_for_gpu(in_float)


def test_gradients_flow_through_experts(mixtures, together):
    model = llmq.load(mixtures("mixtral"), "cpu", torch.float32)
    inputs = model.get_input_embeddings()(some_tokens(1, 5)).requires_grad_()
    model(inputs_embeds=inputs).logits.sum().backward()
    assert inputs.grad.abs().min() > 0


def test_an_expert_that_does_not_exist_stands_for_none(mixtures, together):
    model = llmq.load(mixtures("gpt_oss"), "cpu", torch.float32)
    module = model.get_submodule(next(iter(layouts(model))))
    X, scores = torch.randn(3, 64), torch.rand(3, 2)
    index = torch.tensor([[0, 4], [4, 4], [1, 2]])
    assert_close(module(X, index, scores), run_experts(module, X, index, scores))


def test_graphs_can_replay_what_kernels_compute(mixtures, together, monkeypatch):
    monkeypatch.setattr(packed_experts, "has_kernel", lambda problem, device: problem.has_kernel)
    for name, waits in {"mixtral": False, "llama4_text": True}.items():
        model = llmq.load(mixtures(name), "cpu", torch.float32)
        assert waits_for_gpu(model)  # no kernel takes float32
        assert waits_for_gpu(model.to(torch.bfloat16)) is waits
