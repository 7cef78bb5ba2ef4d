#!/bin/sh
# mlx-lm 0.32.2 with transformers 5.23.0: Ernie 4.5 MoE sends tokens to other experts, because a tensor is left out.
#
# transformers adds e_score_correction_bias to the scores of the router before it chooses experts. The `sanitize` of
# mlx_lm's ernie4_5_moe removes this tensor when it opens a model, and its router has no such bias; so mlx_lm.convert
# writes models without it. Nothing is said. For other models that have such a bias, mlx_lm keeps it. With biases of 0,
# the logits agree.
#
# Seen on 2026-11-30, Linux, mlx on its CPU backend:
#   relative difference of the logits: 2e-06 with biases of 0, 0.37 with others
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

directory = Path(sys.argv[1])
torch.manual_seed(0)
config = Ernie4_5_MoeConfig(
    vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1,
    moe_layer_start_index=0, moe_layer_end_index=1, initializer_range=0.3,
)
model = AutoModelForCausalLM.from_config(config).eval()
ids = np.arange(48)[None] % 64


def difference():
    model.save_pretrained(directory)
    stored = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(stored | stored["rope_parameters"]))
    theirs, _ = load_model(directory)
    theirs.set_dtype(mx.float32)
    found = np.array(theirs(mx.array(ids)))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


without = difference()
with torch.no_grad():
    for layer in model.model.layers:
        layer.mlp.gate.moe_statics.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8)[None])
biased = difference()
print(f"relative difference of the logits: {without:.0e} with biases of 0, {biased:.2f} with others")
assert without < 1e-5
assert biased > 0.05, "mlx_lm routes Ernie's tokens with the biases now"
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
