"""A key-value cache of fixed tensors, for a decode step that always runs the same operators."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer


class Window:
    """What all layers of a cache share: how far it is filled, and how much of it a step looks at."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.prefill = True
        """Whether whole prompts are written, from the first place on, as into an empty cache."""
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        """The place of the next token, [1]. A step reads it from here, so recordings and graphs can move on."""
        self.length = capacity
        """Attention looks at this many places. A mask hides those that are not filled."""


class _WindowLayer(StaticLayer):
    """The keys and values of one layer. A layer with a sliding window keeps all of them: its mask hides old ones."""

    def __init__(self, window: Window) -> None:
        super().__init__(window.capacity)
        self.window = window

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.window.prefill  # transformers makes masks for such layers even where none seems necessary

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def places(like: Tensor) -> Tensor:
            return like.new_zeros(*like.shape[:2], self.window.capacity, like.shape[-1])

        self.keys, self.values = places(key_states), places(value_states)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Float[Tensor, "b h q d"], value_states: Float[Tensor, "b h q e"], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values, and return those that attention looks at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self.window.prefill:
            self.keys[:, :, : key_states.shape[2]] = key_states
            self.values[:, :, : key_states.shape[2]] = value_states
            return key_states, value_states
        self.keys.index_copy_(2, self.window.position, key_states)
        self.values.index_copy_(2, self.window.position, value_states)
        return self.keys[:, :, : self.window.length], self.values[:, :, : self.window.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.window.prefill else self.window.length), 0

    def get_seq_length(self) -> Any:
        return 0 if self.window.prefill else self.window.position[0]


def window_cache(config: Any, window: Window) -> Cache:
    """Return a cache for a model with attention layers only."""
    return Cache(layers=[_WindowLayer(window) for _ in range(config.get_text_config(decoder=True).num_hidden_layers)])
