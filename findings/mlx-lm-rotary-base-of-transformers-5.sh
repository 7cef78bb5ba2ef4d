#!/bin/sh
# mlx-lm 0.32.2 with transformers 5.23.0: most models get another rotary base than the one in config.json, without a word.
#
# transformers 5 writes the rotary base as rope_parameters.rope_theta. The ModelArgs of mlx_lm for Qwen2 (and Llama,
# Mixtral, ...) look for rope_theta at the top of config.json, do not find it, and take their default: 1,000,000 for Qwen2.
# A Qwen2 with another base is opened without a message and computes something else. With rope_theta written at the top
# as well, the logits agree.
#
# Seen on 2026-11-29, Linux, mlx on its CPU backend:
#   rope_theta in rope_parameters: 10000.0; mlx_lm uses 1000000
#   relative difference of the logits: 1.03; with rope_theta at the top: 2e-06
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
from transformers import AutoModelForCausalLM, Qwen2Config

directory = Path(sys.argv[1])
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, initializer_range=0.5,
)
model = AutoModelForCausalLM.from_config(config).eval()
model.save_pretrained(directory)
ids = np.arange(48)[None] % 64
with torch.no_grad():
    expected = model(torch.from_numpy(ids)).logits.numpy()


def opened():
    theirs, settings = load_model(directory)
    theirs.set_dtype(mx.float32)
    found = np.array(theirs(mx.array(ids)))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected)), theirs.args.rope_theta


stored = json.loads((directory / "config.json").read_text())
assert "rope_theta" not in stored
wrong, base = opened()
print(f"rope_theta in rope_parameters: {stored['rope_parameters']['rope_theta']}; mlx_lm uses {base:.0f}")
(directory / "config.json").write_text(json.dumps(stored | {"rope_theta": 10000.0}))
right, _ = opened()
print(f"relative difference of the logits: {wrong:.2f}; with rope_theta at the top: {right:.0e}")
assert base == 1000000
assert wrong > 0.05, "mlx_lm reads rope_parameters of Qwen2 now"
assert right < 1e-5
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/model" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
