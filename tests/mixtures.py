"""Packed checkpoints of tiny mixtures of experts."""

import torch
from architectures.tiny_models import save_tiny
from hf_checkpoints import change_config, regrouped
from packed import pack, random_weight, rewrite
from safetensors.torch import load_file

from llmq.checkpoint.output_dir import REPORT
from llmq.formats import gptq
from llmq.formats.scheme import Scheme


class Mixtures:
    """Directories by type of model and settings, made when first asked for."""

    def __init__(self, root):
        self.root, self.made = root, {}

    def source(self, name):
        """The original model."""
        directory = self.root / name
        if not directory.exists():
            save_tiny(name, directory)
        return directory

    def __call__(self, name, **options):
        key = (name, *sorted(options.items()))
        if key not in self.made:
            output, settings = self.root / f"packed-{len(self.made)}", {"format": "auto"} | options
            self.made[key] = pack(self.source(name), output, **settings)
        return self.made[key]


def stored(directory):
    """All tensors in a directory of one shard, as bytes by name, with their dtypes and shapes."""
    tensors = load_file(directory / "model.safetensors")
    return {
        name: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def become_act_order(directory):
    """GPTQ as AutoGPTQ writes it: groups of 32 inputs anywhere in a row, a bias of zeros for every linear."""
    (directory / REPORT).unlink()

    def change(tensors):
        for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            words, rows = tensors[f"{name}.qweight"].shape
            weight = regrouped(random_weight(rows, 8 * words, words // 4), [32] * (words // 4))
            tensors |= gptq.encode(name, weight, Scheme(4, 32, True, act_order=True))
            tensors[f"{name}.bias"] = torch.zeros(rows)

    rewrite(directory, change)
    change_config(directory, lambda config: config["quantization_config"].update(desc_act=True))
    return directory
