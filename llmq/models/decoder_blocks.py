"""Finds the decoder blocks of a model."""

from typing import Any

from torch import nn

from llmq.core.errors import RequestError


def find_blocks(model: Any) -> list[str]:
    """Return the names of the decoder blocks in order. They are the only ModuleList with `num_hidden_layers` entries.

    Raises RequestError if there is no such list, or more than one.
    """
    decoder = model.get_decoder()
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    lists = [name for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1 or depth == 0:
        raise RequestError(
            f"{type(model).__name__} does not expose one list of {depth} decoder blocks (found {len(lists)}); "
            "llmq quantizes decoder-only models such as Llama, Mistral, Qwen, Gemma and Phi"
        )
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [".".join(filter(None, (prefix, lists[0], str(i)))) for i in range(depth)]


def refuse_without_linears(blocks: list[nn.Module]) -> None:
    """Raise RequestError if no block holds a linear."""
    if not any(isinstance(module, nn.Linear) for block in blocks for module in block.modules()):
        raise RequestError(f"{type(blocks[0]).__name__} holds no nn.Linear: there is nothing llmq can quantize")
