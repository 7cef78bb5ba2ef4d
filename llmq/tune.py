"""python -m llmq.tune: find the fastest tiles for a model's layers on this GPU; later runs use them."""

from dataclasses import dataclass
from functools import partial

from llmq.cli import run
from llmq.core.settings import Grid
from llmq.runtime.tiles import check_gpu, problems_of, tune_here


@dataclass(frozen=True)
class TuneConfig:
    """Time the kernels on the shapes of a model's layers, and write the fastest tiles to ~/.cache/llmq/tuned.

    Later runs on the same kind of GPU use them.
    """

    model: str
    """A packed checkpoint, or an original model that you will quantize (directory, hub id, .gguf file or `demo`)."""
    bits: int = 4
    """Bits per weight that the original model will get. A packed checkpoint has its own."""
    group_size: int = 128
    """Group size that the original model will get; -1 for a whole row. A packed checkpoint has its own."""
    seconds: float = 60.0
    """Start no measurement after this many seconds. Shapes with few tokens are measured first."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for models you trust."""

    @property
    def grid(self) -> Grid:
        """Return the grid that the original model will get."""
        return Grid(self.bits, self.group_size)


def tune_command(config: TuneConfig) -> None:
    """Tune the layers, and print the tile and the gain of each."""
    check_gpu()
    problems = problems_of(config.model, config.grid, config.trust_remote_code)
    table, rows = tune_here(problems, config.seconds)
    for row in rows:
        tile = row["tile"] or {}
        how = "BN={BN} BM={BM} warps={warps} stages={stages} splits={splits}".format_map(tile) if tile else "dequantize"
        gain = f", {row['rule_us'] / row['us']:.2f} times as fast as untuned" if row["rule_us"] else ""
        print(f"up to {row['M']:>3} tokens, {row['N']} x {row['K']}: {row['us']:.1f} us, {how}{gain}")
    left = len(problems) - len(rows)
    note = f"; there was no time for {left} of {len(problems)} problems: allow more with --seconds" if left else ""
    print(f"wrote {table}{note}")


main = partial(run, TuneConfig, tune_command)

if __name__ == "__main__":
    main()
