"""python -m llmq.convert DIR --output DIR2 --format F: write the same codes, scales and zeros in another format."""

from functools import partial

from llmq.cli import run
from llmq.run.convert import ConvertConfig, convert


def convert_command(config: ConvertConfig) -> None:
    """Convert the checkpoint, and print where the result is."""
    print(f"wrote {convert(config, progress=True, tell=print)}")


main = partial(run, ConvertConfig, convert_command)

if __name__ == "__main__":
    main()
