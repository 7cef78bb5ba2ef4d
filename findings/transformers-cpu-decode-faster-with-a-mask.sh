#!/bin/sh
# transformers 5.23.0 on a CPU: a decode step of a model with grouped heads is faster if one sequence has padding.
#
# For one new token, transformers' sdpa attention can treat the query heads that share keys and values as several queries
# of one head. It does so only if there is a mask. Without a mask it asks torch for grouped attention (enable_gqa), on a
# CPU as on a GPU, which takes longer in torch 2.13 on a CPU. A sequence without padding needs no mask. So the common case
# is the slow one. A static cache always has a mask, and is fast.
#
# Seen on 2026-11-30, Linux, 2 cores with AVX-512 BF16, torch 2.13.0:
#   one step, 32 sequences of 512 tokens:
#   no padding 37 ms, one token of padding 15 ms
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

torch.manual_seed(0)
size = {"hidden_size": 768, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 64}
heads = {"num_attention_heads": 12, "num_key_value_heads": 1, "head_dim": 64}
model = LlamaForCausalLM(LlamaConfig(**size, **heads)).to(torch.bfloat16).eval()
ids = torch.randint(64, (32, 513))
whole, padded = torch.ones_like(ids), torch.ones_like(ids)
padded[0, 0] = 0


@torch.inference_mode()
def seconds(mask):
    times = []
    for _ in range(9):
        cache = DynamicCache()
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1)
        started = time.perf_counter()
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


seconds(whole)
without, with_mask = seconds(whole), seconds(padded)
print("one step, 32 sequences of 512 tokens:")
print(f"no padding {without * 1000:.0f} ms, one token of padding {with_mask * 1000:.0f} ms")
assert without > 1.3 * with_mask, "both take about the same time now"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
