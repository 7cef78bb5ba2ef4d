#!/bin/sh
# peft 0.21.2: a custom LoRA layer for a module that holds its weight in buffers ends in a bare StopIteration.
#
# LoraConfig._register_custom_module lets users adapt classes of linears that peft does not know; its documentation says
# that the class can be any nn.Module. Quantized linears keep integers in buffers and have no parameters. After peft has
# put the adapter in place, it looks for the device of the layer: in qweight, W_q or weight, and else in the first
# parameter, which is not there. The error names neither the layer nor the reason. With any attribute `qweight` that is a
# tensor the same model gets its adapters.
#
# Seen on 2026-11-29, Linux, torch 2.13.0 on a CPU:
#   buffers only: StopIteration ''
#   with qweight: adapters on ['0']
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
"$folder/venv/bin/pip" install --quiet peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$folder/run.py" <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn


class Int8Linear(nn.Module):
    """An int8 weight and a scale for each row, both in buffers."""

    def __init__(self, weight):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.codes * self.scale).T


class WithQweight(Int8Linear):
    @property
    def qweight(self):
        return self.codes


def adapted(kind):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"])
    config._register_custom_module({kind: LoraLinear})
    return get_peft_model(nn.Sequential(kind(torch.randn(8, 4)), nn.Linear(8, 4)), config)


try:
    adapted(Int8Linear)
except StopIteration as error:
    print(f"buffers only: StopIteration {str(error)!r}")
else:
    raise SystemExit("peft adapts a module without parameters now")
model = adapted(WithQweight)
layers = [name for name, module in model.base_model.model.named_modules() if isinstance(module, LoraLinear)]
print(f"with qweight: adapters on {layers}")
assert layers == ["0"]
assert model(torch.randn(3, 4)).shape == (3, 4)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/run.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
