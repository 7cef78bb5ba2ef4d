"""Finds the decoder blocks of a model."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmq.core.errors import RequestError

# Names that configurations give to the number of blocks. In the first one some models count sublayers (LongCat-Flash),
# or the blocks of an encoder (Bart).
_DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")


def find_blocks(model: Any) -> list[str]:
    """Return the names of the decoder blocks in order.

    They are the ModuleList of the decoder whose length the configuration names, and the largest one if there are more
    (Gemma 3n has short lists of projections). Lists within a list, such as experts, do not count.

    Raises RequestError if there is no such list, or if two are the largest.
    """
    decoder, config = decoder_of(model), model.config.get_text_config()
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    towers = [name for name, m in decoder.named_modules() if _is_tower(m, config)]
    lists = {
        name: m for name, m in lists.items() if not name.startswith(tuple(f"{tower}." for tower in towers if tower))
    }
    outer = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    depths = [depth for key in _DEPTHS if (depth := getattr(config, key, 0))]
    found = next((some for depth in depths if (some := _of_length(outer, depth))), {})
    largest = [name for name, size in found.items() if size == max(found.values())]
    if len(largest) != 1:
        raise RequestError(
            f"{type(model).__name__} does not expose one list of {(depths or [0])[0]} decoder blocks "
            f"(found {len(largest)}); llmq quantizes decoder-only models such as Llama, Mistral, Qwen, Gemma and Phi"
        )
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [".".join(filter(None, (prefix, largest[0], str(i)))) for i in range(len(outer[largest[0]]))]


def _is_tower(module: nn.Module, config: Any) -> bool:
    """Return whether a module is a model for pictures or sound."""
    return isinstance(module, PreTrainedModel) and type(module.config) is not type(config)


def decoder_of(model: Any) -> Any:
    """Return the part of a model that turns tokens into hidden states."""
    decoder = model.get_decoder()  # ModernBERT calls the last projection so
    has_lists = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    return decoder if has_lists else model.base_model


def _of_length(lists: dict[str, nn.ModuleList], length: int) -> dict[str, int]:
    """Return the numbers of parameters of the lists of this length, by name."""
    return {name: sum(p.numel() for p in m.parameters()) for name, m in lists.items() if len(m) == length}


def shared_by_blocks(model: Any, blocks: list[str]) -> set[str]:
    """Return the names of tensors that belong to several blocks (Zamba): under each of their names."""
    prefixes = tuple(f"{block}." for block in blocks)
    tied = getattr(model, "all_tied_weights_keys", {}).items()
    return {name for pair in tied if all(each.startswith(prefixes) for each in pair) for name in pair}


def refuse_without_linears(blocks: list[nn.Module]) -> None:
    """Raise RequestError if no block holds a linear."""
    if not any(isinstance(module, nn.Linear) for block in blocks for module in block.modules()):
        raise RequestError(f"{type(blocks[0]).__name__} holds no nn.Linear: there is nothing llmq can quantize")
