"""python -m llmq.convert DIR --output DIR2 --format F: write the same codes, scales and zero points in another format."""

from __future__ import annotations

from llmq.cli import run
from llmq.run.convert import ConvertConfig, convert


def convert_command(config: ConvertConfig) -> None:
    """Convert the checkpoint and print where it is."""
    directory = convert(config, progress=True)
    print(f"wrote {directory}")


def main() -> None:
    """Run the command; its flags are the fields of ConvertConfig."""
    run(ConvertConfig, convert_command)


if __name__ == "__main__":
    main()
