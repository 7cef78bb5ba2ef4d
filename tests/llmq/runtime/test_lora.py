import pytest
import torch
from packed import dequantized_model, logits, pack, some_tokens
from peft import LoraConfig

import llmq
from llmq.core.errors import CheckpointError, RequestError
from llmq.runtime.packed_linear import PackedLinear

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def packed(llama, tmp_path):
    return pack(llama, tmp_path / "packed")


def adapters(model):
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def trained(model, steps=10):
    optimizer, ids = torch.optim.Adam(adapters(model).values(), lr=0.01), some_tokens()
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_adapters_learn_on_packed_weights_which_stay_as_they_are(packed):
    model = llmq.load(packed, "cpu")
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    adapted = llmq.get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS))
    assert {name.split(".")[-3] for name in adapters(adapted)} == {"lora_A", "lora_B"}
    losses = trained(adapted)
    assert losses[-1] < 0.95 * losses[0]
    after = {name.replace("base_model.model.", "").replace(".base_layer", ""): t for name, t in adapted.named_buffers()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_gradients_of_adapters_are_those_on_dense_weights_of_the_same_values(packed, llama):
    """peft itself adapts the dense model, so it says what is right."""
    import peft

    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(0)
    mine = llmq.get_peft_model(llmq.load(packed, "cpu", torch.float32), config)
    dense = peft.get_peft_model(dequantized_model(llama, packed), config)
    with torch.no_grad():
        for name, tensor in adapters(dense).items():
            tensor.copy_(adapters(mine)[name])
    ids = some_tokens()
    for model in (mine, dense):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, tensor in adapters(dense).items():
        torch.testing.assert_close(adapters(mine)[name].grad, tensor.grad, rtol=1e-3, atol=1e-6)


def test_trained_adapters_are_opened_again_on_the_packed_model(packed, tmp_path):
    model = llmq.get_peft_model(llmq.load(packed, "cpu"), LoraConfig(r=4, target_modules=TARGETS))
    trained(model, 3)
    model.save_pretrained(tmp_path / "adapter")
    again = llmq.get_peft_model(llmq.load(packed, "cpu"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again, some_tokens()), logits(model, some_tokens()))
    assert any(isinstance(module, PackedLinear) for module in again.modules())


def test_what_does_not_fit_packed_weights_is_refused_with_the_way_out(packed, tmp_path):
    model = llmq.get_peft_model(llmq.load(packed, "cpu"), LoraConfig(r=4, target_modules=TARGETS))
    with pytest.raises(RequestError, match="rounded again"):
        model.merge_and_unload()
    with pytest.raises(RequestError, match="DoRA"):
        llmq.get_peft_model(llmq.load(packed, "cpu"), LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    with pytest.raises(CheckpointError, match="no adapter"):
        llmq.get_peft_model(llmq.load(packed, "cpu"), tmp_path / "nothing")
