"""python -m llmq.convert DIR --output DIR2 --format F: write the same codes, scales and zeros in another format."""

from llmq.cli import run
from llmq.run.convert import ConvertConfig, convert


def main() -> None:
    """Run the command; its flags are the fields of ConvertConfig."""
    run(ConvertConfig, lambda config: print(f"wrote {convert(config, progress=True)}"))


if __name__ == "__main__":
    main()
