"""python -m llmq.inspect DIR: what is in a packed checkpoint, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from llmq.checkpoint.reader import Checkpoint
from llmq.cli import Positional, run


@dataclass(frozen=True)
class InspectConfig:
    """Show format, bits, group size and bytes of every packed layer; every layer is decoded once and checked."""

    directory: Annotated[Path, Positional]
    """The checkpoint."""
    json: bool = False
    """Print one JSON object and nothing else on stdout."""


def describe(directory: Path) -> dict[str, Any]:
    """The checkpoint's layers and totals. Raises CheckpointError if it is not a packed checkpoint."""
    checkpoint = Checkpoint(directory)
    sizes = {name: checkpoint.files.nbytes(name) for name in checkpoint.files.names()}
    layers = [_layer(checkpoint, name, sizes) for name in checkpoint.linears]
    weights = sum(layer["out"] * layer["in"] for layer in layers)
    packed = sum(layer["bytes"] for layer in layers)
    return {
        "directory": str(directory),
        "quant_method": checkpoint.quantization["quant_method"],
        "format": checkpoint.format.METHOD,
        "bits": sorted({layer["bits"] for layer in layers}),
        "symmetric": all(layer["symmetric"] for layer in layers),
        "layers": layers,
        "packed_weights": weights,
        "packed_bytes": packed,
        "bits_per_packed_weight": 8 * packed / weights,
        "other_bytes": sum(sizes.values()) - packed,
    }


def _layer(checkpoint: Checkpoint, name: str, sizes: dict[str, int]) -> dict[str, Any]:
    """One packed layer, decoded."""
    weight, scheme = checkpoint.weight(name), checkpoint.schemes[name]
    rows, columns = weight.q.shape
    zero = weight.zero.float()
    return {
        "name": name,
        "out": rows,
        "in": columns,
        "bits": weight.bits,
        "group_size": columns if scheme.group_size == -1 else scheme.group_size,
        "symmetric": scheme.symmetric,
        "act_order": scheme.act_order,
        "zero": {"min": int(zero.min()), "mean": float(zero.mean()), "max": int(zero.max())},
        "scale_dtype": str(weight.scale.dtype).removeprefix("torch."),
        "bytes": sum(sizes.get(f"{name}.{part}", 0) for part in checkpoint.format.TENSOR_SUFFIXES),
    }


def inspect_command(config: InspectConfig) -> None:
    """Describe and print."""
    about = describe(config.directory)
    if config.json:
        print(json.dumps(about))
        return
    bits, kind = ", ".join(map(str, about["bits"])), "symmetric" if about["symmetric"] else "asymmetric"
    print(f"{about['quant_method']}, {bits} bit, {kind}")
    print(f"{'layer':<48} {'out x in':>14} {'bits':>4} {'group':>6} {'zeros':>12} {'bytes':>12}")
    for layer in about["layers"]:
        zero = layer["zero"]
        zeros = f"{zero['min']}" if zero["min"] == zero["max"] else f"{zero['min']}..{zero['mean']:.1f}..{zero['max']}"
        size = f"{layer['group_size']}{' act order' if layer['act_order'] else ''}"
        shape = f"{layer['out']}x{layer['in']}"
        print(f"{layer['name']:<48} {shape:>14} {layer['bits']:>4} {size:>6} {zeros:>12} {layer['bytes']:>12,}")
    packed, other = about["packed_bytes"] / 1e6, about["other_bytes"] / 1e6
    weights = f"{len(about['layers'])} packed layers: {about['packed_weights']:,} weights in {packed:.1f} MB"
    print(f"{weights}, {about['bits_per_packed_weight']:.2f} bits per weight; {other:.1f} MB unquantized")


def main() -> None:
    """Entry point; the flags are the fields of InspectConfig."""
    run(InspectConfig, inspect_command)


if __name__ == "__main__":
    main()
