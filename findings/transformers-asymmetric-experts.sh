#!/bin/sh
# transformers 5.23.0 with compressed-tensors 0.20.0: asymmetric packed experts cannot be opened, symmetric ones can.
#
# The experts of a Qwen3-MoE are packed one by one (pack-quantized, 4 bit) by the package's own compressor. The symmetric
# checkpoint opens. The asymmetric one fails with "Asymmetric quant requires zero-point values", although its zero points
# are in the file: for experts, transformers gives the compressor weight_packed, weight_scale and weight_shape, and no
# weight_zero_point. dequantize=True, with which asymmetric linears open, fails as well. Way out: symmetric experts.
#
# Seen on 2026-11-28:
#   symmetric, default: opened; symmetric, dequantize=True: opened
#   asymmetric, default: RuntimeError; asymmetric, dequantize=True: RuntimeError
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.0 accelerate torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )
).eval()
linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
compressor = BaseCompressor.get_value_from_registry("pack-quantized")
outcomes = {}
for symmetric in (True, False):
    folder = Path(sys.argv[1]) / str(symmetric)
    model.save_pretrained(folder)
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format="pack-quantized")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors.pop(name)
        groups = weight.unflatten(1, (-1, 32))
        parts = {"weight": weight}
        if symmetric:
            parts["weight_scale"] = groups.abs().amax(-1) / 7
        else:
            parts["weight_scale"] = (groups.amax(-1) - groups.amin(-1)) / 15
            parts["weight_zero_point"] = (-8 - groups.amin(-1) / parts["weight_scale"]).round().to(torch.int8)
        for part, tensor in compressor.compress(parts, scheme).items():
            tensors[f"{name.removesuffix('weight')}{part}"] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": [*linears, "re:.*mlp.gate$"], "config_groups": {"experts": group},
    }
    (folder / "config.json").write_text(json.dumps(config))
    stored = any(name.endswith("weight_zero_point") for name in tensors)
    for option in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        case = f"{'symmetric' if symmetric else 'asymmetric'}, {'dequantize=True' if option else 'default'}"
        try:
            AutoModelForCausalLM.from_pretrained(folder, **option)
            outcomes[case] = "opened"
        except RuntimeError:
            outcomes[case] = "RuntimeError"
        print(f"{case} (zero points in the file: {stored}): {outcomes[case]}")
assert list(outcomes.values()) == ["opened"] * 2 + ["RuntimeError"] * 2, "it opens such a checkpoint now"
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/checkpoint" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
grep -m1 -o "AssertionError: Asymmetric.*" "$folder/log"
