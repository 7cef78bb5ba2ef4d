"""A decode step, made ready once and then run for every token: recorded on a CPU, captured as a CUDA graph on a GPU."""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from llmq.core.errors import first_line
from llmq.runtime.decode_cache import Window, window_cache
from llmq.runtime.fusion import fused
from llmq.runtime.packed_experts import waits_for_gpu
from llmq.runtime.recording import RecordingError, compiled, record

# Attention looks at this many places of the cache, and at twice as many whenever the text has filled them. So a short
# text is not slower for the room that is kept for a long one, and few steps are made ready.
_SHORTEST = 128
# Largest difference between a prepared step and the model itself, relative to the largest logit. Recordings differ in
# their last digits: the demo model's by 2e-6. One that still has its first token or position is off by a tenth or more.
_SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class DecodeStep:
    """Runs a model on one token per sequence, with a cache of its own, for one number of sequences.

    `prefill` reads prompts; then each call of `logits` adds a token to each. It can begin again with other prompts.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self.model, self.device = model, model.device
        waits = self.device.type == "cuda" and waits_for_gpu(model)
        self.plain: str | None = "which of its experts run is only known on the GPU" if waits else None
        """Why steps run through the model itself, if they do."""
        self.seconds = 0.0
        """Time spent on steps that made others ready or checked them."""
        self.steps = 0
        """How many those were."""
        self._ready: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self._unchecked: set[tuple[int, bool]] = set()
        self._proven: set[tuple[int, bool]] = set()
        self._dense: dict[int, Any] = {}  # copies of dense weights in 16 bits
        self._token, self._place = (torch.zeros(batch, 1, dtype=torch.long, device=self.device) for _ in range(2))
        self._filled, self._padded = 0, False
        self._parameters = inspect.signature(model.forward).parameters
        self._pool: Any = None
        self._make_room(_SHORTEST)

    def _make_room(self, places: int) -> None:
        """Make a cache. What was made ready for an older one goes with it."""
        self._window = Window(places, self.device)
        self._cache = window_cache(self.model.config, self._window)
        self._mask = torch.ones(len(self._token), places, dtype=torch.bool, device=self.device)
        self._forget()

    def _forget(self) -> None:
        for made in (self._ready, self._unchecked, self._proven, self._dense):
            made.clear()

    @torch.inference_mode()
    def prefill(
        self, ids: Int64[Tensor, "b t"], mask: Int64[Tensor, "b t"] | None, room: int
    ) -> Float[Tensor, "b vocabulary"]:
        """Read prompts into an empty cache. Return the logits of the next tokens, float32.

        Args:
            ids: the prompts, padded on the left.
            mask: 0 for padding, 1 elsewhere; None if there is no padding.
            room: places that the cache must have, for prompts and new tokens.
        """
        if room > self._window.capacity:
            self._make_room(-(-room // _SHORTEST) * _SHORTEST)
        length, self._padded = ids.shape[1], mask is not None
        places = torch.arange(length, device=self.device).expand(ids.shape)
        if mask is not None:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            self._mask.fill_(True)
            self._mask[:, :length] = mask.bool()
        self._unchecked.update(self._ready)
        self._window.prefill = True
        logits = self._forward(ids, places, mask)
        self._window.prefill = False
        self._window.position.fill_(length)
        self._place.copy_(places[:, -1:] + 1)
        self._filled = length
        return logits.float()

    @torch.inference_mode()
    def logits(self, tokens: Int64[Tensor, "b"]) -> Float[Tensor, "b vocabulary"]:
        """Add a token to each sequence. Return the logits of the next ones, float32."""
        self._token.copy_(tokens[:, None])
        size = _SHORTEST
        while size <= self._filled:
            size *= 2
        self._window.length = min(size, self._window.capacity)
        logits = self._run((self._window.length, self._padded)).float()
        self._window.position += 1
        self._place += 1
        self._filled += 1
        return logits

    def _forward(self, ids: Tensor, places: Tensor, mask: Tensor | None) -> Tensor:
        """Return the model's logits [b, vocabulary] for the last of these tokens."""
        given = {"attention_mask": mask, "position_ids": places, "logits_to_keep": 1}
        given = {name: value for name, value in given.items() if name in self._parameters}
        return self.model(ids, past_key_values=self._cache, use_cache=True, **given).logits[:, -1]

    def _through_model(self, token: Tensor, place: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        self._window.position = position
        return self._forward(token, place, mask[:, : self._window.length] if self._padded else None)

    def _inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return all that differs between steps. What a step takes from elsewhere is fixed when it is made ready."""
        return self._token, self._place, self._window.position, self._mask

    def _run(self, key: tuple[int, bool]) -> Tensor:
        if self.plain is None and key in self._ready and key not in self._unchecked:
            return self._ready[key]()
        if self.plain is not None:
            return self._through_model(*self._inputs())
        started = time.perf_counter()
        logits = self._check(key) if key in self._ready else self._prepare(key)
        self.seconds, self.steps = self.seconds + time.perf_counter() - started, self.steps + 1
        return logits

    def _prepare(self, key: tuple[int, bool]) -> Tensor:
        """Run a step through the model, and make the next ones of this kind ready."""
        if self.device.type == "cuda":
            logits = self._through_model(*self._inputs())
            self._ready[key] = self._graph()
        else:
            try:
                logits, recording = record(self._through_model, self._inputs())
            except RecordingError as error:
                self.plain = f"{error} depends on values"
                return self._through_model(*self._inputs())
            play = compiled(fused(recording, self._dense))
            self._ready[key] = lambda: play(*self._inputs())
        self._unchecked.add(key)
        return logits

    def _check(self, key: tuple[int, bool]) -> Tensor:
        """Run a step in both ways: the second one of a kind, and the first one of its kind in every text.

        What was fixed while it was made ready shows in a difference; so does a model that was changed in the meantime
        where `fast_generation._state_of` does not see it. Then steps are made ready again.
        """
        ready = None
        try:
            ready = self._ready[key]()
        except Exception as error:  # torch's bindings may refuse what its operators take
            self.plain = f"a prepared step does not run ({first_line(error)})"
        logits = self._through_model(*self._inputs())  # the last one, so that its keys and values stay in the cache
        if ready is None:
            return logits
        off = float((ready - logits).abs().max() / logits.abs().max())
        if off <= _SAME[logits.dtype]:
            self._unchecked.discard(key)
            self._proven.add(key)
        elif key in self._proven:
            self._forget()
        else:
            self.plain = f"a prepared step differs from the model by {off:.1e}"
        return logits

    def _graph(self) -> Callable[[], Tensor]:
        """Capture a step as a CUDA graph."""
        inputs, side = self._inputs(), torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):  # what a first call compiles and allocates, a capture must not
            self._through_model(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # a kernel that is collected during a capture would unload itself and end the capture
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=side):
                logits = self._through_model(*inputs)
        finally:
            if collecting:
                gc.enable()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
