"""Measure the tokens per second of a packed checkpoint and of its original, on one machine in one run.

    python scripts/bench_generate.py --packed demo-out/gptq-4bit --original demo

The models take turns. So other work on the machine slows all of them. The script prints medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

import llmq
from llmq.core.device import pick_device
from llmq.models.model_source import ModelSource


def tokens_per_second(model: Any, ids: torch.Tensor, tokens: int) -> float:
    """Return the speed of greedy decoding. The time includes the prompt."""
    started = time.perf_counter()
    output = model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if output.is_cuda:
        torch.cuda.synchronize()
    assert output.shape[1] == ids.shape[1] + tokens
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", required=True, help="a packed checkpoint")
    parser.add_argument("--original", default="demo", help="the model that the checkpoint was made from")
    parser.add_argument("--prompt", default="The capital of France is", help="text that the models continue")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per run")
    parser.add_argument("--runs", type=int, default=5, help="runs per model; the median is printed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    source = ModelSource(args.original)
    models = {
        "original, bf16": source.load_all(device, torch.bfloat16),
        "original, float32": source.load_all(device, torch.float32),
        "packed": llmq.load(args.packed, args.device),
        "packed, merged": llmq.load(args.packed, args.device, merge=True),
    }
    ids = source.tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(device)
    for model in models.values():
        tokens_per_second(model, ids, 8)  # Warm up: caches, lazy layouts, compiled kernels.
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.runs):
        for name, model in models.items():
            speeds[name].append(tokens_per_second(model, ids, args.tokens))
    base = statistics.median(speeds["original, bf16"])
    for name, runs in speeds.items():
        median = statistics.median(runs)
        spread = f"{min(runs):.1f} to {max(runs):.1f}"
        print(f"{name:18} {median:7.1f} tokens/s   {median / base:5.2f}x   ({spread}, {len(runs)} runs)")


if __name__ == "__main__":
    main()
