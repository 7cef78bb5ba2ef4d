#!/bin/sh
# transformers 5.23.0 with compressed-tensors 0.20.0: a packed checkpoint whose experts stay in float cannot be opened.
#
# A Qwen3-MoE whose attention is packed (pack-quantized, 4 bit) and whose experts stay in float is compressed by the
# package itself and saved by `save_pretrained`, which writes the experts one by one (experts.0.gate_proj.weight, ...).
# `from_pretrained` of that directory then fails: "Concatenate on tensors destined for ...experts.gate_up_proj. Ckpt
# contains: 0". The reason: for a compressed-tensors checkpoint it looks for the packed tensors of experts only, and
# finds no plain ones. With dequantize=True it fails as well. The same happens to every other tensor that transformers
# puts together from several in the files, such as the convolutions of OLMo-Hybrid. Way out: pack the experts too, or
# open the checkpoint with a tool that reads both.
#
# Seen on 2026-11-28:
#   default: RuntimeError, experts.gate_up_proj: Concatenate on tensors ... Ckpt contains: 0
#   dequantize=True: RuntimeError
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 compressed-tensors==0.20.0 accelerate torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import sys

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
    )
).eval()
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
groups = {"attention": {"targets": ["Linear"], "weights": weights}}
status = {"format": "pack-quantized", "quantization_status": "compressed"}
apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], **status))
for module in model.modules():
    if hasattr(module, "weight_scale"):
        module.weight_scale.data.fill_(0.01)
compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
compressor.compress_model(model)
model.save_pretrained(sys.argv[1])
compressor.update_config(sys.argv[1])
failed = []
for name, options in {"default": {}, "dequantize=True": {"quantization_config": CompressedTensorsConfig(dequantize=True)}}.items():
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
        print(f"{name}: opened")
    except RuntimeError as error:
        failed.append(name)
        print(f"{name}: RuntimeError: {str(error)[:90]}")
assert failed == ["default", "dequantize=True"], "it opens such a checkpoint now"
PYTHON
"$folder/venv/bin/python" "$folder/run.py" "$folder/checkpoint" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
grep -m1 -o "Concatenate on tensors.*" "$folder/log"
