"""python -m llmq.inspect DIR: print what a packed checkpoint holds, layer by layer."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from llmq.checkpoint.describe import describe
from llmq.cli import Positional, run


@dataclass(frozen=True)
class InspectConfig:
    """Show format, bits, group size, zero points and bytes of every packed layer. Each is decoded and checked."""

    directory: Annotated[Path, Positional]
    """Directory of the packed checkpoint."""
    json: bool = False
    """Print one JSON object on stdout, and nothing else."""


def inspect_command(config: InspectConfig) -> None:
    """Print the layers as a table, or as JSON."""
    from llmq.verification.stated_share import SHARE, stated_share  # imports transformers, which --help can do without

    checkpoint, share = describe(config.directory), stated_share(config.directory)
    if config.json:
        print(json.dumps(checkpoint | {SHARE: share}))
        return
    bits, symmetry = ", ".join(map(str, checkpoint["bits"])), "symmetric" if checkpoint["symmetric"] else "asymmetric"
    print(f"{checkpoint['quant_method']}, {bits} bit, {symmetry}")
    print(f"{'layer':<48} {'out x in':>14} {'bits':>4} {'group':>6} {'zeros':>12} {'bytes':>12}")
    for layer in checkpoint["layers"]:
        zero = layer["zero"]
        zeros = f"{zero['min']}" if zero["min"] == zero["max"] else f"{zero['min']}..{zero['mean']:.1f}..{zero['max']}"
        size = f"{layer['group_size']}{' act order' if layer['act_order'] else ''}"
        shape = f"{layer['out']}x{layer['in']}"
        print(f"{layer['name']:<48} {shape:>14} {layer['bits']:>4} {size:>6} {zeros:>12} {layer['bytes']:>12,}")
    shares = {bits: count / checkpoint["packed_weights"] for bits, count in checkpoint["weights_by_bits"].items()}
    if len(shares) > 1:
        print("mixture: " + ", ".join(f"{share:.1%} of the weights in {bits} bit" for bits, share in shares.items()))
    packed, other = checkpoint["packed_bytes"] / 1e6, checkpoint["other_bytes"] / 1e6
    weights = f"{len(checkpoint['layers'])} packed layers: {checkpoint['packed_weights']:,} weights in {packed:.1f} MB"
    print(f"{weights}, {checkpoint['bits_per_packed_weight']:.2f} bits per weight; {other:.1f} MB unquantized")
    told = {"token": "with a scale for each token", "tensor": "with one scale for all tokens"}
    for kind, how in told.items():
        if count := sum(layer["inputs"] == kind for layer in checkpoint["layers"]):
            print(f"{count} layers round their inputs to 8 bits, {how}")
    if share:
        print(share)


main = partial(run, InspectConfig, inspect_command)

if __name__ == "__main__":
    main()
