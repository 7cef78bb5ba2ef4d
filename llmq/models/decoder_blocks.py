"""Finds the decoder blocks of a model."""

from typing import Any

from torch import nn

from llmq.core.errors import RequestError

# Names that configurations give to the number of blocks. In the first one some models count sublayers (LongCat-Flash),
# or the blocks of an encoder (Bart).
_DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")


def find_blocks(model: Any) -> list[str]:
    """Return the names of the decoder blocks in order.

    They are the ModuleList of the decoder whose length the configuration names, and the largest one if there are more
    (Gemma 3n has short lists of projections). Lists within a list, such as experts, do not count.

    Raises RequestError if there is no such list, if two are the largest, or if blocks share weights.
    """
    decoder, config = model.get_decoder(), model.config.get_text_config()
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
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
    names = [".".join(filter(None, (prefix, largest[0], str(i)))) for i in range(len(outer[largest[0]]))]
    _refuse_shared_weights(model, names)
    return names


def _of_length(lists: dict[str, nn.ModuleList], length: int) -> dict[str, int]:
    """Return the numbers of parameters of the lists of this length, by name."""
    return {name: sum(p.numel() for p in m.parameters()) for name, m in lists.items() if len(m) == length}


def _refuse_shared_weights(model: Any, blocks: list[str]) -> None:
    """Raise RequestError if a weight belongs to two blocks (Zamba): it would be quantized for one of them only."""
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        one, two = (next((block for block in blocks if key.startswith(f"{block}.")), None) for key in (name, other))
        if one is not None and two is not None and one != two:
            raise RequestError(
                f"{two} and {one} share {other.removeprefix(two + '.')}; llmq quantizes each block alone"
            )


def refuse_without_linears(blocks: list[nn.Module]) -> None:
    """Raise RequestError if no block holds a linear."""
    if not any(isinstance(module, nn.Linear) for block in blocks for module in block.modules()):
        raise RequestError(f"{type(blocks[0]).__name__} holds no nn.Linear: there is nothing llmq can quantize")
