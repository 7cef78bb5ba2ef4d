"""python -m llmq.quantize: quantize a model and write a packed checkpoint."""

from llmq.cli import run
from llmq.core.config import QuantizeConfig
from llmq.pipeline import quantize


def main() -> None:
    """Run the command; its flags are the fields of QuantizeConfig."""
    run(QuantizeConfig, lambda config: quantize(config, progress=True))


if __name__ == "__main__":
    main()
