"""Small trainings for the tests of this room."""

import json

import torch
from safetensors.torch import load_file

import llmq
from llmq.checkpoint.output_dir import REPORT

FAST = {"steps": 8, "batch": 4, "micro_batch": 2, "sequence_length": 32, "samples": 40, "checks": 4, "device": "cpu"}


def train(model, text, output, **options):
    rates = {} if "lora" in options else {"scale_rate": 0.01}
    rates |= {"rate": 0.2} if options.get("learn") in ("codes", "all") else {}
    return llmq.train(llmq.TrainConfig(str(model), output, (str(text),), **(FAST | rates | options)))


def report_of(directory):
    return json.loads((directory / REPORT).read_text())


def moved(before, after):
    """The kinds of tensors that differ between two checkpoints."""
    old, new = (load_file(path / "model.safetensors") for path in (before, after))
    assert old.keys() == new.keys()
    return {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}


def stopped(*args, **kwargs):
    raise KeyboardInterrupt
