"""python -m llmq.inspect DIR: what is in a packed checkpoint, layer by layer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from llmq.cli import Positional, run
from llmq.load import Checkpoint


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
    layers = []
    for name in checkpoint.linears:
        rows, columns = checkpoint.weight(name).q.shape
        groups = checkpoint.files.shape(f"{name}.weight_scale")[1]
        size = sum(sizes.get(f"{name}.{part}", 0) for part in checkpoint.format.PARTS)
        layers.append({"name": name, "out": rows, "in": columns, "group_size": columns // groups, "bytes": size})
    weights = sum(layer["out"] * layer["in"] for layer in layers)
    packed = sum(layer["bytes"] for layer in layers)
    return {
        "directory": str(directory),
        "format": checkpoint.format.METHOD,
        "bits": checkpoint.scheme["num_bits"],
        "symmetric": checkpoint.scheme["symmetric"],
        "layers": layers,
        "packed_weights": weights,
        "packed_bytes": packed,
        "bits_per_packed_weight": 8 * packed / max(1, weights),
        "other_bytes": sum(sizes.values()) - packed,
    }


def inspect_command(config: InspectConfig) -> None:
    """Describe and print."""
    about = describe(config.directory)
    if config.json:
        print(json.dumps(about))
        return
    print(f"{about['format']}, {about['bits']} bit, {'symmetric' if about['symmetric'] else 'asymmetric'}")
    print(f"{'layer':<48} {'out x in':>14} {'group':>6} {'bytes':>12}")
    for layer in about["layers"]:
        shape = f"{layer['out']}x{layer['in']}"
        print(f"{layer['name']:<48} {shape:>14} {layer['group_size']:>6} {layer['bytes']:>12,}")
    packed, other = about["packed_bytes"] / 1e6, about["other_bytes"] / 1e6
    weights = f"{len(about['layers'])} packed layers: {about['packed_weights']:,} weights in {packed:.1f} MB"
    print(f"{weights}, {about['bits_per_packed_weight']:.2f} bits per weight; {other:.1f} MB unquantized")


def main() -> None:
    """Entry point; the flags are the fields of InspectConfig."""
    run(InspectConfig, inspect_command)


if __name__ == "__main__":
    main()
