"""python -m llmq.quantize: quantize a model and write a packed checkpoint."""

from functools import partial

from llmq.cli import run
from llmq.core.config import QuantizeConfig
from llmq.pipeline import quantize

main = partial(run, QuantizeConfig, partial(quantize, progress=True))

if __name__ == "__main__":
    main()
