#!/bin/sh
# compressed-tensors 0.20.0: symmetric int8 scales are max / 127.5, so the largest value of every token is cut off.
#
# A symmetric scale is the largest magnitude divided by half of the 255 steps between -128 and 127. The largest value then
# lands on 127.5, is rounded to 128 and cut off at 127: it comes back as 126.5, half a step too small, if it is positive.
# (A negative one lands on -127.5 and is kept as -128.) So even a token of whole numbers up to 127, which int8 holds as
# they are, does not come back. vLLM's int8 kernel for dynamic inputs divides by 127 (its sources, 2026-11-29), where it
# does. A model that is evaluated in transformers therefore rounds other inputs than the engine that serves it.
#
# Seen on 2026-11-29, Linux, torch 2.13.0 on a CPU:
#   scale 0.996078, by 127 it would be 1
#   in   [127.0, 64.0, -3.0, 1.0]
#   out  [126.5, 63.75, -2.99, 1.0]
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet compressed-tensors==0.20.0 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

token = torch.tensor([[127.0, 64.0, -3.0, 1.0]])
inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token")
scale, zero = compute_dynamic_scales_and_zp(token, inputs, torch.nn.Identity())
back = fake_quantize(token, scale, zero, inputs)
print(f"scale {float(scale):.6f}, by 127 it would be 1")
print("in  ", token[0].tolist())
print("out ", [round(x, 2) for x in back[0].tolist()])
assert abs(float(scale) - 127 / 127.5) < 1e-4, "the scale is another one now"
assert abs(float(back[0, 0]) - 126.5) < 0.01, "the largest value comes back now"
exact = fake_quantize(token, torch.ones_like(scale), zero, inputs)
assert torch.equal(exact, token), "int8 does not hold the token with a scale of 1"
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
