"""python -m llmq.write: let a model write texts of its own, to train on or to calibrate with."""

from functools import partial

from llmq.cli import run
from llmq.runtime.own_texts import WriteConfig, write_texts


def write_command(config: WriteConfig) -> None:
    """Write the texts, and say where they are."""
    path = write_texts(config, progress=True)
    print(f"{config.samples:,} texts of {config.sequence_length} tokens: {path}")


main = partial(run, WriteConfig, write_command)

if __name__ == "__main__":
    main()
