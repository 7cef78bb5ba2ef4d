#!/bin/sh
# peft 0.21.2 with transformers 5.23.0 and compressed-tensors 0.20.0: no LoRA on a packed checkpoint as it is opened.
#
# A tiny Llama is compressed by the package itself (pack-quantized, 4 bit) and opened by `from_pretrained`. Its packed
# linears are of the class torch.nn.Linear, but have weight_packed and weight_scale instead of a weight. peft goes by the
# class, takes its layer for plain linears, and reads the weight. So QLoRA, which peft offers for GPTQ, AWQ and other
# packed weights, ends in an AttributeError that does not say that the checkpoint is quantized. Way out: open it with
# dequantize=True, which needs the memory of the weights in 16 bits.
#
# Seen on 2026-11-29, Linux, torch 2.13.0 on a CPU:
#   default: AttributeError: 'Linear' object has no attribute 'weight'
#   dequantize=True: adapters
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 compressed-tensors==0.20.0 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import sys

from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
).eval()
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
groups = {"all": {"targets": ["Linear"], "weights": weights}}
status = {"format": "pack-quantized", "quantization_status": "compressed"}
apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"], **status))
for module in model.modules():
    if hasattr(module, "weight_scale"):
        module.weight_scale.data.fill_(0.01)
compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
compressor.compress_model(model)
model.save_pretrained(sys.argv[1])
compressor.update_config(sys.argv[1])
dequantized = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
seen = {}
for name, options in {"default": {}, "dequantize=True": dequantized}.items():
    opened = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)
    try:
        get_peft_model(opened, LoraConfig(r=2, target_modules=["q_proj"]))
        seen[name] = "adapters"
    except AttributeError as error:
        seen[name] = f"AttributeError: {error}"
    print(f"{name}: {seen[name]}")
assert seen == {"default": "AttributeError: 'Linear' object has no attribute 'weight'", "dequantize=True": "adapters"}
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" "$folder/checkpoint" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
