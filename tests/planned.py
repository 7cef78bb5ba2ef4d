"""Opens requests for the tests of plan/, on the CPU."""

import torch

from llmq.core.config import QuantizeConfig
from llmq.core.distributed import ALONE
from llmq.run.block_quantizer import Run
from llmq.run.prepare import open_request

SMALL = ("--group-size", "32", "--samples", "10", "--sequence-length", "64")


def open_run(model, text, output, ranks=ALONE, **options):
    """Return the request to quantize a model, and its run."""
    defaults = {"calibration": str(text), "samples": 10, "sequence_length": 64, "group_size": 32}
    config = QuantizeConfig(model=str(model), output=output, **(defaults | options))
    cpu = torch.device("cpu")
    request = open_request(config, cpu, ranks, progress=False)
    return request, Run(config, request.source, cpu, request.clock, ranks)
