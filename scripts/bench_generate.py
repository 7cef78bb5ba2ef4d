"""Measure the tokens per second of a packed checkpoint and of its original, on one machine in one run.

    python scripts/bench_generate.py --packed demo-out/gptq-4bit --original demo

Each model writes the same number of tokens with `fast_generate`; the packed one also with transformers' `generate`. The
models take turns. So other work on the machine slows all of them. The script prints medians: tokens of the prompt per
second, new tokens per second without the prompt, the speed-up over the original in bf16, and the time that making the
decode step ready took, once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import llmq
from llmq.core.device import pick_device
from llmq.models.model_source import ModelSource
from llmq.runtime.fast_generation import Timing, fast_generate

Run = Callable[[], tuple[list[int], Timing]]


def fast(model: Any, ids: torch.Tensor, tokens: int) -> Run:
    """Return a run of `fast_generate`."""

    def run() -> tuple[list[int], Timing]:
        done = fast_generate(model, ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        if done.plain is not None:
            raise SystemExit(f"error: fast_generate was not fast: {done.plain}")
        return done.sequences[0].tolist(), done.timing

    return run


def plain(model: Any, ids: torch.Tensor, tokens: int) -> Run:
    """Return a run of transformers' loop. A run of one token tells the time of the prompt."""

    def seconds(tokens: int) -> tuple[list[int], float]:
        started = time.perf_counter()
        text = model.generate(ids, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)[0].tolist()
        return text, time.perf_counter() - started

    def run() -> tuple[list[int], Timing]:
        _, prompt = seconds(1)
        text, all_of_it = seconds(tokens)
        return text, Timing(ids.shape[1], tokens, prompt, decode_seconds=all_of_it - prompt)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", required=True, help="a packed checkpoint")
    parser.add_argument("--original", default="demo", help="the model that the checkpoint was made from")
    parser.add_argument("--prompt", default="The capital of France is", help="text that the models continue")
    parser.add_argument("--prompt-tokens", type=int, help="repeat the prompt to this many tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens per run")
    parser.add_argument("--runs", type=int, default=5, help="runs per model; the medians are printed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    device = pick_device(args.device)
    source = ModelSource(args.original)
    ids = source.tokenizer(args.prompt, return_tensors="pt")["input_ids"].to(device)
    if args.prompt_tokens:
        ids = ids.repeat(1, -(-args.prompt_tokens // ids.shape[1]))[:, : args.prompt_tokens]
    packed = llmq.load(args.packed, args.device, merge=True)
    runs = {
        # Two sources: a source has one model, and loading it again would change the first one.
        "original, bf16": fast(source.load_all(device, torch.bfloat16), ids, args.tokens),
        "original, float32": fast(ModelSource(args.original).load_all(device, torch.float32), ids, args.tokens),
        "packed": fast(packed, ids, args.tokens),
        "packed, transformers' loop": plain(packed, ids, args.tokens),
    }
    ready = {name: run()[1].capture_seconds for name, run in runs.items()}
    done: dict[str, list[tuple[list[int], Timing]]] = {name: [] for name in runs}
    for _ in range(args.runs):
        for name, run in runs.items():
            done[name].append(run())
    base = statistics.median(timing.decode_rate for _, timing in done["original, bf16"])
    for name, each in done.items():
        rates = [timing.decode_rate for _, timing in each]
        prompt = statistics.median(timing.prompt_tokens / timing.prefill_seconds for _, timing in each)
        median = statistics.median(rates)
        spread = f"{min(rates):.1f} to {max(rates):.1f}, {len(rates)} runs"
        print(
            f"{name:26} prompt {prompt:7.1f} tokens/s   {median:7.1f} tokens/s {median / base:5.2f}x   "
            f"ready in {ready[name]:5.2f} s   ({spread})"
        )
    same = done["packed"][0][0] == done["packed, transformers' loop"][0][0]
    print(f"both loops of the packed model wrote {'the same text' if same else 'different texts'}")


if __name__ == "__main__":
    main()
