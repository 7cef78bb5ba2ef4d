"""Packed checkpoints of every kind that llmq reads, as it and other tools write them."""

import json
import shutil
from pathlib import Path

import torch
from packed import pack, random_weight, rewrite, with_real_zeros
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.checkpoint.reader import Checkpoint
from llmq.core.quantized_weight import QuantizedWeight
from llmq.formats import gptq, mlx
from llmq.formats.scheme import Scheme

NORM = "model.layers.0.input_layernorm.weight"
TABLE, BITS = "model.embed_tokens", 6  # of a weight that MLX packs beside the linears
WRITTEN = {
    "compressed-tensors": {},
    "compressed-tensors, asymmetric": {"bits": 3, "symmetric": False},
    "gptq": {"format": "gptq"},
    "gptq_v2": {"format": "gptq", "bits": 8, "symmetric": False},
    "awq": {"format": "awq", "symmetric": False},
    "mlx": {"format": "mlx", "layer_bits": ("down_proj=2",)},
}


def opened(directory, **options):
    """The model as transformers opens it through llmq."""
    config = AutoConfig.from_pretrained(directory)
    config.quantization_config = {"quant_method": "llmq"}
    return AutoModelForCausalLM.from_pretrained(directory, config=config, **options)


def change_config(directory, change):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def quantization(directory, key="quantization_config"):
    return json.loads((directory / "config.json").read_text()).get(key)


def become_auto_round(directory):
    """What AutoRound writes: tensors of GPTQ, but for the group of each input."""
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("g_idx")])
    entry = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int"}
    change_config(directory, lambda config: config.update(quantization_config=entry))


def regrouped(weight, sizes, shuffled=True):
    """The codes of a weight with its groups made of so many inputs, anywhere in the row or one after the other."""
    group_of = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(torch.tensor(sizes))
    if shuffled:
        group_of = group_of[torch.randperm(len(group_of), generator=torch.Generator().manual_seed(0))]
    return QuantizedWeight(weight.q, weight.scale, weight.zero, weight.bits, group_of)


def become_groups_of_64(directory, act_order):
    """One group for 64 inputs; a long and a short one for 96."""
    scheme = Scheme(4, 64, True, act_order)

    def change(tensors):
        for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            words, rows = tensors[f"{name}.qweight"].shape
            sizes = {64: [64], 96: [64, 32]}[8 * words]
            weight = regrouped(random_weight(rows, 8 * words, len(sizes)), sizes, act_order)
            tensors.update(gptq.encode(name, weight, scheme))

    rewrite(directory, change)
    change_config(directory, lambda c: c["quantization_config"].update(group_size=64, desc_act=act_order))


def with_packed_weight(source, output, name, bits=BITS, linear_bits=4):
    """An MLX checkpoint in which another weight is packed; and that weight."""
    directory = pack(source, output, format="mlx", bits=linear_bits)
    rows, columns = Checkpoint(directory).files.shape(f"{name}.weight")
    weight = with_real_zeros(random_weight(rows, columns, columns // 32, bits, dtype=torch.bfloat16))
    rewrite(directory, lambda tensors: tensors.update(mlx.encode(name, weight, Scheme(bits, 32, False))))
    own = {name: {"bits": bits, "group_size": 32, "mode": "affine"}}
    change_config(directory, lambda config: config["quantization"].update(own))
    return directory, weight


FOREIGN = {
    "auto-round": become_auto_round,
    "quantize_config.json": lambda directory: change_config(directory, lambda c: c.pop("quantization_config")),
    "act order": lambda directory: become_groups_of_64(directory, True),
    "a short last group": lambda directory: become_groups_of_64(directory, False),
}

ROUTES = {"llmq": lambda directory: llmq.load(directory, "cpu"), "transformers": opened}


class Checkpoints:
    """Packed directories by kind, made when first asked for.

    Args:
        root: where to make them.
        source: the model to pack.
    """

    def __init__(self, root, source):
        self.root, self.source, self.made = root, source, {}

    def __call__(self, kind):
        if kind not in self.made:
            output = self.root / kind.replace(" ", "-")
            if kind in WRITTEN:
                self.made[kind] = pack(self.source, output, **WRITTEN[kind])
            else:
                FOREIGN[kind](Path(shutil.copytree(self("gptq"), output)))
                self.made[kind] = output
        return self.made[kind]


def make_checkpoints(root):
    """Those of a tiny Qwen2, with biases and tied embeddings."""
    return Checkpoints(root, save_tiny(root / "source", "qwen2"))
