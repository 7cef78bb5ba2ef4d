"""llama.cpp on the CPU: logits, text, speed, and its own quantizer.

with Llama("model.gguf") as llama:
    logits = llama.logits(llama.tokenize("Paris is"))
"""

from __future__ import annotations

import ctypes as c
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from llama_library import Batch, Importance, defaults, failed, library

from llmq.core.errors import RequestError, WorkError

FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "Q2_0": 41,
}
_TENSOR_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8}


def quantize(
    source: Path,
    output: Path,
    kind: str,
    *,
    pure: bool = False,
    importance: Mapping[str, np.ndarray] | None = None,
    embeddings: str = "F16",
) -> None:
    """Write a GGUF of another type, as llama-quantize does.

    Args:
        kind: a key of FILE_TYPES. Of a file that is quantized already, only F32 and F16 are made.
        pure: give this type to all matrices.
        importance: for each tensor of the file, the mean square of each of its inputs: float32 [in].
        embeddings: the type of the embeddings (F32, F16 or Q8_0). An output matrix of its own gets it, too.

    Raises WorkError with llama.cpp's own words.
    """
    llama = library()
    settings, _ = defaults(llama, "llama_model_quantize_default_params")
    settings.threads, settings.file_type, settings.pure = 1, FILE_TYPES[kind], pure
    settings.requantize = kind in ("F32", "F16")
    settings.embedding_type = settings.output_type = _TENSOR_TYPES[embeddings]
    kept = {name: np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    entries = [Importance(name.encode(), values.ctypes.data, values.size) for name, values in kept.items()]
    if entries:  # the list ends with an empty entry
        together = (Importance * (len(entries) + 1))(*entries, Importance())
        settings.importance = c.addressof(together)
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(output), c.byref(settings)):
        raise failed(f"cannot write {output} as {kind}")


class Speed(NamedTuple):
    """Tokens per second."""

    prefill: float
    decode: float


class Llama:
    """A model in llama.cpp, on the CPU. Use it in a with statement. Raises WorkError if the file does not open."""

    def __init__(self, path: Path | str, threads: int = 1) -> None:
        self._llama, self._threads = library(), threads
        settings, _ = defaults(self._llama, "llama_model_default_params")
        self._model = c.c_void_p(self._llama.llama_model_load_from_file(os.fsencode(path), settings))
        if not self._model:
            raise failed(f"cannot open {path}")
        self._vocabulary = c.c_void_p(self._llama.llama_model_get_vocab(self._model))
        self._words = int(self._llama.llama_vocab_n_tokens(self._vocabulary))

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_model_free(self._model)

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text. `special`: with BOS and EOS as the model wants them."""
        encoded = text.encode()
        room = len(encoded) + 2
        tokens = (c.c_int32 * room)()
        count = self._llama.llama_tokenize(
            self._vocabulary, encoded, len(encoded), tokens, room, c.c_bool(special), c.c_bool(True)
        )
        if count < 0:
            raise WorkError(f"llama.cpp made {-count} tokens of {len(encoded)} bytes")
        return tokens[:count]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits float32 [tokens, vocabulary] of one sequence, with attention in float32."""
        with _Sequence(self._llama, self._model, len(tokens), self._threads, exact=True) as sequence:
            return sequence.step(tokens, self._words, every=True)

    def generate(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return up to `count` tokens that follow, each the most likely one. Stops before an end-of-text token."""
        new: list[int] = []
        with _Sequence(self._llama, self._model, len(tokens) + count, self._threads, exact=True) as sequence:
            logits = sequence.step(tokens, self._words)
            while len(new) < count:
                token = int(logits[-1].argmax())
                if self._llama.llama_vocab_is_eog(self._vocabulary, token):
                    break
                new.append(token)
                logits = sequence.step([token], self._words)
        return new

    def speed(self, prompt: Sequence[int], count: int = 64, clock: Callable[[], float] = time.perf_counter) -> Speed:
        """Measure tokens per second as llama.cpp runs by default: medians of three, after one run to warm up."""
        prefill, decode = list[float](), list[float]()
        for _ in range(4):
            with _Sequence(self._llama, self._model, len(prompt) + count, self._threads, exact=False) as sequence:
                at = [clock()]
                sequence.step(prompt, self._words)
                at.append(clock())
                for i in range(count):
                    sequence.step([prompt[i % len(prompt)]], self._words)
                at.append(clock())
            prefill.append(len(prompt) / (at[1] - at[0]))
            decode.append(count / (at[2] - at[1]))
        return Speed(median(prefill[1:]), median(decode[1:]))


class _Sequence:
    """The state of one sequence of at most `length` tokens. `exact`: keys and values in float32, no flash attention."""

    def __init__(self, llama: Any, model: Any, length: int, threads: int, exact: bool) -> None:
        settings, _ = defaults(llama, "llama_context_default_params")
        settings.tokens = settings.batch = 256 * math.ceil(length / 256)  # other lengths are rounded up to these
        settings.outputs_per_sequence = 0  # all
        settings.threads = settings.batch_threads = threads
        if exact:
            settings.keys = settings.values = 0  # F32
            settings.flash_attention = 0
        self._llama, self._context = llama, c.c_void_p(llama.llama_init_from_model(model, settings))
        if not self._context:
            raise failed(f"cannot make a context of {length} tokens")

    def __enter__(self) -> _Sequence:
        return self

    def __exit__(self, *_: object) -> None:
        self._llama.llama_free(self._context)

    def step(self, tokens: Sequence[int], words: int, every: bool = False) -> np.ndarray:
        """Append tokens. Returns the logits float32 [1, words] of the last, or [tokens, words] of every one."""
        if not tokens or not all(0 <= token < words for token in tokens):
            raise RequestError(f"tokens must be some numbers below {words}")
        rows, count = len(tokens) if every else 1, len(tokens)
        ids, outputs = (c.c_int32 * count)(*tokens), (c.c_int8 * count)(*[every] * (count - 1), 1)
        batch = Batch(count, c.addressof(ids), None, None, None, None, c.addressof(outputs))
        if self._llama.llama_decode(self._context, batch):
            raise failed(f"cannot compute {count} tokens")
        return np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), (rows, words)).copy()
