"""python -m llmq.tune: find the fastest tiles for a model's layers on this GPU, once; later runs use them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmq.cli import run
from llmq.core.errors import WorkError
from llmq.core.settings import Grid
from llmq.runtime.tiles import problems_of, tune_here


@dataclass(frozen=True)
class TuneConfig:
    """Time the kernels on the shapes of a model's layers and keep the fastest tiles in ~/.cache/llmq/tuned."""

    model: str
    """A packed checkpoint, or an original model (directory, hub id, .gguf file or `demo`) that is going to be one."""
    bits: int = 4
    """Bits per weight an original model is going to have; a packed checkpoint says so itself."""
    group_size: int = 128
    """Its group size, likewise; -1 for a whole row."""
    seconds: float = 60.0
    """Begin nothing after this; few tokens come first."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size)


def tune_command(config: TuneConfig) -> None:
    """Tune, write the table, and say what it brought."""
    if not torch.cuda.is_available():
        raise WorkError("there is no CUDA GPU here: nothing to tune on a CPU, whose matmuls have no tiles to choose")
    problems = problems_of(config.model, config.grid, config.trust_remote_code)
    table, rows = tune_here(problems, config.seconds)
    for row in rows:
        tile = row["tile"] or {}
        how = "BN={BN} BM={BM} warps={warps} stages={stages} splits={splits}".format_map(tile) if tile else "dequantize"
        gain = f", {row['rule_us'] / row['us']:.2f} times as fast as untuned" if row["rule_us"] else ""
        print(f"up to {row['M']:>3} tokens, {row['N']} x {row['K']}: {row['us']:.1f} us, {how}{gain}")
    left = len(problems) - len(rows)
    print(f"wrote {table}" + (f"; no time for {left} of {len(problems)} problems (--seconds)" if left else ""))


def main() -> None:
    """Entry point; the flags are the fields of TuneConfig."""
    run(TuneConfig, tune_command)


if __name__ == "__main__":
    main()
