"""LoRA adapters on packed linears, by peft (Hu et al., arXiv 2106.09685): y = Q(W) x + B A x · alpha / r.

peft knows which classes of linears it can adapt. `get_peft_model` tells it about PackedLinear. The packed weight stays
as it is: gradients pass through it, and only A and B learn.
"""

from pathlib import Path
from typing import Any

from llmq.core.errors import CheckpointError, RequestError, first_line
from llmq.runtime.packed_linear import PackedLinear


def get_peft_model(model: Any, adapter: Any) -> Any:
    """Return a model with LoRA adapters, like peft.get_peft_model, but its linears may be packed.

    `adapter`: a peft.LoraConfig, for new adapters; or a directory of trained ones, as peft writes it.

    Raises RequestError if peft is not installed, or for a kind of adapter that changes the weight itself.
    """
    try:
        import peft
        from peft.tuners.lora import Linear
    except ImportError:
        raise RequestError("LoRA needs the package peft: pip install peft") from None

    class PackedLora(Linear):
        """The adapters of one packed linear."""

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def merge(self, *_: Any, **__: Any) -> None:
            raise RequestError(
                "a packed weight cannot take up an adapter: it would have to be rounded again.\n"
                "llmq.train --lora does that, or use the adapter beside the packed model"
            )

    is_trained = isinstance(adapter, str | Path)
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter)) if is_trained else adapter
    except (ValueError, OSError, TypeError) as error:
        raise CheckpointError(f"{adapter} holds no adapter that peft can read: {first_line(error)}") from None
    if not isinstance(config, peft.LoraConfig) or config.use_dora:
        raise RequestError("only LoRA fits packed weights; DoRA and other adapters change the weight itself")
    # Experimental, but the way that the documentation of peft names for other classes of linears.
    config._register_custom_module({PackedLinear: PackedLora})  # pyright: ignore[reportPrivateUsage]
    if is_trained:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter), config=config)
    else:
        adapted = peft.get_peft_model(model, config)
    for module in adapted.modules():
        if isinstance(module, PackedLinear):
            module.changed()  # experts that were put together for a GPU would run without their adapters
    return adapted
