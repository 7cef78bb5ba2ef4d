"""python -m llmq.train: train a model while its weights are quantized, and write a packed checkpoint."""

from functools import partial

from llmq.cli import run
from llmq.core.train_config import TrainConfig
from llmq.qat.road import train

main = partial(run, TrainConfig, partial(train, progress=True))

if __name__ == "__main__":
    main()
