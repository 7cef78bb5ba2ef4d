"""Rows and blocks of packed linears go where llama.cpp's converter puts the rows and columns of floats."""

import re
from collections import defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from architectures.tiny_models import tiny_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmq.models.gguf_converter import Converted, Leaf, open_converter
from llmq.models.gguf_layout import Source, lay_out

BLOCK = 32
PACKED = {
    "llama": r"layers\..*_proj",
    "mixtral": r"self_attn\..*_proj|experts\.\d+\.w\d",
    "qwen3_moe": r"layers\..*_proj",
    "gpt2": r"h\.\d+\..*(c_attn|c_proj|c_fc)",
    "falcon@40b": r"h\.\d+\..*(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)",
    "bloom": r"h\.\d+\..*(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)",
    "phi3": r"layers\..*_proj",
    "granitemoeshared": r"self_attn\..*_proj|shared_mlp\..*_linear",
    "deepseek_v2": r"layers\..*_(proj|mqa|b)",
    "qwen3_5_text": r"(self_attn|mlp|linear_attn)\..*_proj",
}
"""Patterns for the names of the linears that are packed."""
IN_FLOAT = {"deepseek_v2": "kv_b_proj", "qwen3_5_text": "linear_attn.out_proj"}
"""What the converter transposes in part; of which it moves columns that are narrower than a block."""


class Saved:
    """A tiny model in a directory: the tensors of its files, and which of them are packed."""

    def __init__(self, directory, name, **changes):
        self.directory, config = directory, tiny_config(name)
        for key, value in changes.items():
            setattr(config, key, value)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
        tensors = load_file(self.directory / "model.safetensors")
        self.weights = {
            key.removesuffix(".weight"): tensor
            for key, tensor in tensors.items()
            if re.search(rf"({PACKED[name]})\.weight$", key)
        }
        self.is_transposed = name == "gpt2"
        self.floats = {key: leaf(t) for key, t in tensors.items() if key.removesuffix(".weight") not in self.weights}
        self.converted = Converted(self.directory, name, self.floats)

    def rows(self, linear):
        """The weight of a linear. [out, in]"""
        return self.weights[linear].T if self.is_transposed else self.weights[linear]

    def blocks(self, linear):
        return self.rows(linear).unflatten(1, (-1, BLOCK)).contiguous().numpy()

    def laid(self, kind_of=lambda _: "Q4_0"):
        seen = torch.Tensor.t if self.is_transposed else torch.Tensor.detach
        sources = {f"{name}.weight": Source(tuple(t.shape), [(name, seen)]) for name, t in self.weights.items()}
        return lay_out(self.converted, sources, {name: (kind_of(name), BLOCK) for name in self.weights})

    def as_floats(self):
        """What the converter makes of the packed linears' weights: arrays by the names in the file."""
        found = {}

        def collect(_, added):
            if added.of is not None:
                found[added.name] = type(added.data).to_eager(added.data)

        packed = {f"{name}.weight": leaf(t) for name, t in self.weights.items()}
        open_converter(self.converted, packed, collect).prepare_tensors()
        return found


def leaf(tensor):
    return Leaf(tuple(tensor.shape), torch.float32, lambda: tensor.float().clone())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tiny models by name, made when first asked for."""
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: Saved(root / name, name))


@pytest.mark.parametrize("name", PACKED)
def test_blocks_are_moved_as_the_converter_moves_weights(name, saved):
    model = saved(name)
    (laid, fixed), floats, written = model.laid(), model.as_floats(), defaultdict(list)
    for tensor, each in laid.items():
        placed = each.placed(model.blocks)
        wanted = floats[tensor].reshape(len(each.row), -1, BLOCK)
        assert np.array_equal(placed, wanted), tensor
        for linear in each.linears:
            rows, blocks = each.taken(linear, placed)
            assert np.array_equal(blocks, model.blocks(linear)[rows]), linear
            written[linear] += rows.tolist()
    for linear in model.weights:
        assert sorted(written[linear]) == ([] if linear in fixed else [*range(len(model.rows(linear)))]), linear
    assert fixed == {linear for linear in model.weights if linear.endswith(IN_FLOAT.get(name, "nothing"))}


def order(laid, tensor):
    return laid[tensor].row.tolist()


def test_rows_of_a_rotation_lie_in_pairs(saved):
    """q has 4 heads of 16 rows, of which llama.cpp turns two neighbours together."""
    laid, fixed = saved("llama").laid()
    assert not fixed
    assert order(laid, "blk.0.attn_q.weight")[:6] == [0, 8, 1, 9, 2, 10]
    assert order(laid, "blk.1.attn_k.weight")[16:20] == [16, 24, 17, 25]
    assert order(laid, "blk.0.attn_v.weight") == [*range(32)]
    assert laid["blk.1.attn_v.weight"].linears == ["model.layers.1.self_attn.v_proj"]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_are_stacked_in_their_order(name, saved):
    laid, fixed = saved(name).laid()
    assert not fixed
    each = laid["blk.1.ffn_down_exps.weight"]
    assert [int(re.search(r"experts\.(\d+)", linear)[1]) for linear in each.linears] == [0, 1, 2, 3]
    assert each.source.tolist() == [expert for expert in range(4) for _ in range(64)]


@pytest.mark.parametrize("name", ["falcon@40b", "bloom"])
def test_rows_of_q_k_and_v_are_taken_apart(name, saved):
    laid, _ = saved(name).laid()
    rows = order(laid, "blk.0.attn_qkv.weight")
    assert rows != sorted(rows)
    assert sorted(rows) == [*range(len(rows))]


def test_a_linear_may_become_two_tensors(saved):
    laid, _ = saved("granitemoeshared").laid()
    linear = "model.layers.0.shared_mlp.input_linear"
    both = laid["blk.0.ffn_gate_shexp.weight"], laid["blk.0.ffn_up_shexp.weight"]
    assert [each.linears for each in both] == [[linear]] * 2
    assert [row for each in both for row in each.row.tolist()] == [*range(len(saved("granitemoeshared").rows(linear)))]


@pytest.mark.parametrize("width", [4, 32])
def test_columns_move_if_whole_blocks_of_them_do(width, saved, tmp_path):
    """Qwen 3.5's heads are put in another order: rows of one linear, columns of the next one."""
    heads = {"linear_value_head_dim": width, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    model = Saved(tmp_path, "qwen3_5_text", **heads)
    laid, fixed = model.laid()
    if width == BLOCK:
        assert not fixed
        assert laid["blk.0.ssm_out.weight"].blocks.tolist() == [0, 2, 1, 3]
        placed = laid["blk.0.ssm_out.weight"].placed(model.blocks)
        assert np.array_equal(placed.reshape(64, 128), model.as_floats()["blk.0.ssm_out.weight"])
    else:
        assert fixed == {"model.layers.0.linear_attn.out_proj"}
        assert "blk.0.ssm_out.weight" not in laid


def test_experts_with_other_bits_are_not_packed(saved):
    """A tensor of GGUF has one type, and holds all experts."""
    model = saved("qwen3_moe")
    odd = "model.layers.1.mlp.experts.2.up_proj"
    laid, fixed = model.laid(lambda name: "Q8_0" if name == odd else "Q4_0")
    assert fixed == {re.sub(r"\.2\.", f".{i}.", odd) for i in range(4)}
    assert "blk.1.ffn_up_exps.weight" not in laid
    assert "blk.0.ffn_up_exps.weight" in laid
    assert "blk.1.ffn_gate_exps.weight" in laid
