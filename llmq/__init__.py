"""llmq: quantize the weights of Hugging Face language models, write packed checkpoints, run them.

llmq.quantize(llmq.QuantizeConfig(model="demo", output=Path("demo-4bit")))
model = llmq.load("demo-4bit")
"""

# Eager on purpose: `llmq.load` and `llmq.quantize` mean these functions. (The program llmq/quantize.py is started with
# python -m; it is not meant to be imported.)
from llmq.config import VERSION, QuantizeConfig
from llmq.hf import register
from llmq.load import load
from llmq.pipeline import quantize
from llmq.weight import QuantizedWeight

# The one thing that importing changes: transformers learns a new name, {"quant_method": "llmq"}.
register()

__version__ = VERSION
__all__ = ["QuantizeConfig", "QuantizedWeight", "load", "quantize"]
