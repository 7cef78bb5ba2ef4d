"""Packed checkpoints of tiny mixtures of experts."""

import torch
from architectures.tiny_models import save_tiny
from packed import pack
from safetensors.torch import load_file


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
            self.made[key] = pack(self.source(name), self.root / f"packed-{len(self.made)}", **options)
        return self.made[key]


def stored(directory):
    """All tensors in a directory of one shard, as bytes by name, with their dtypes and shapes."""
    tensors = load_file(directory / "model.safetensors")
    return {
        name: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }
