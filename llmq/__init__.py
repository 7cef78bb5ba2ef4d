"""llmq: quantize the weights of Hugging Face language models, write packed checkpoints, run them.

llmq.quantize(llmq.QuantizeConfig(model="demo", output=Path("demo-4bit")))
model = llmq.load("demo-4bit", merge=True)
text = llmq.fast_generate(model, input_ids, max_new_tokens=64).sequences

Importing llmq imports neither torch nor transformers: each name below is imported when it is first used. The one thing
that importing changes: once transformers is there, it knows the quantization method `llmq`.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmq.core.after_import import after_import

if TYPE_CHECKING:
    from llmq.core.config import QuantizeConfig
    from llmq.core.quantized_weight import QuantizedWeight
    from llmq.core.train_config import TrainConfig
    from llmq.pipeline import quantize
    from llmq.qat.road import train
    from llmq.runtime.fast_generation import fast_generate
    from llmq.runtime.load import load
    from llmq.runtime.lora import get_peft_model

__all__ = [
    "QuantizeConfig",
    "QuantizedWeight",
    "TrainConfig",
    "fast_generate",
    "get_peft_model",
    "load",
    "quantize",
    "train",
]

_HOME_OF = {
    "QuantizeConfig": "llmq.core.config",
    "QuantizedWeight": "llmq.core.quantized_weight",
    "TrainConfig": "llmq.core.train_config",
    "fast_generate": "llmq.runtime.fast_generation",
    "get_peft_model": "llmq.runtime.lora",
    "load": "llmq.runtime.load",
    "quantize": "llmq.pipeline",
    "train": "llmq.qat.road",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from llmq.core.config import VERSION

        return VERSION
    if name not in _HOME_OF:
        raise AttributeError(f"module 'llmq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


class _Package(ModuleType):
    """`import llmq.quantize` would put the program of that name in the place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _register() -> None:
    importlib.import_module("llmq.runtime.transformers_plugin")  # registers itself


after_import("transformers.quantizers.auto", _register)
