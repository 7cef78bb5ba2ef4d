"""Describes a packed checkpoint: format, bits, group size, zero points and bytes of each layer."""

from pathlib import Path
from typing import Any

from llmq.checkpoint.reader import Checkpoint
from llmq.formats import method_of


def describe(directory: Path) -> dict[str, Any]:
    """Decode every layer and return layers and totals. Raises CheckpointError if it is no sound packed checkpoint."""
    checkpoint = Checkpoint(directory)
    sizes = {name: checkpoint.files.nbytes(name) for name in checkpoint.files.names()}
    layers = [_layer(checkpoint, name, sizes) for name in checkpoint.linears]
    weights = sum(layer["out"] * layer["in"] for layer in layers)
    packed = sum(layer["bytes"] for layer in layers)
    return {
        "directory": str(directory),
        "quant_method": method_of(checkpoint.quantization),
        "format": checkpoint.format.METHOD,
        "bits": sorted({layer["bits"] for layer in layers}),
        "symmetric": all(layer["symmetric"] for layer in layers),
        "layers": layers,
        "weights_by_bits": _by_bits(layers),
        "packed_weights": weights,
        "packed_bytes": packed,
        "bits_per_packed_weight": 8 * packed / weights,
        "other_bytes": sum(sizes.values()) - packed,
    }


def _by_bits(layers: list[dict[str, Any]]) -> dict[str, int]:
    """Count the weights that have each number of bits."""
    found = sorted({layer["bits"] for layer in layers})
    return {str(bits): sum(each["out"] * each["in"] for each in layers if each["bits"] == bits) for bits in found}


def _layer(checkpoint: Checkpoint, name: str, sizes: dict[str, int]) -> dict[str, Any]:
    """Decode one packed layer and return its entry."""
    weight, scheme = checkpoint.weight(name), checkpoint.schemes[name]
    rows, columns = weight.q.shape
    zero = weight.zero.float()
    least, most = (round(float(each), 2) if weight.has_real_zeros else int(each) for each in (zero.min(), zero.max()))
    return {
        "name": name,
        "out": rows,
        "in": columns,
        "bits": weight.bits,
        "group_size": columns if scheme.group_size == -1 else scheme.group_size,
        "symmetric": scheme.symmetric or weight.symmetric,
        "act_order": scheme.act_order,
        "inputs": scheme.rounded_inputs or None,
        "zero": {"min": least, "mean": float(zero.mean()), "max": most},
        "scale_dtype": str(weight.scale.dtype).removeprefix("torch."),
        "bytes": sum(sizes.get(f"{name}.{suffix}", 0) for suffix in checkpoint.format.TENSOR_SUFFIXES),
    }
