"""Lets a model continue a prompt."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from llmq.calibration.texts import check_tokens
from llmq.core.errors import RequestError, first_line
from llmq.core.settings import at_revision
from llmq.runtime.fast_generation import Generated, fast_generate
from llmq.runtime.load import load_any


@dataclass(frozen=True)
class GenerateConfig:
    """Let a model continue a prompt. The text is printed as it is written."""

    model: str
    """A packed checkpoint, or an original model (directory, hub id, .gguf file or `demo`)."""
    prompt: str
    """The text to continue. If the model has a chat template, the prompt is a user's message in it."""
    max_new_tokens: int = 64
    """Stop after this many tokens, or earlier if the model ends its text."""
    temperature: float = 0.0
    """0 always takes the most likely token; higher values, such as 0.7, vary the text."""
    seed: int = 0
    """Seed of the random choices at temperatures above 0."""
    chat: bool = True
    """Use the chat template; --no-chat continues the bare prompt."""
    device: str = "auto"
    """auto (cuda if there is a GPU, else cpu), cpu, cuda or cuda:N."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for models you trust."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub; org/name@REVISION means the same."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("--prompt is empty; give a text to continue")
        if self.max_new_tokens < 1:
            raise RequestError(f"--max-new-tokens must be at least 1; got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise RequestError(f"--temperature must be at least 0, and a number; got {self.temperature}")


def generate(config: GenerateConfig) -> Generated:
    """Print the continuation of the prompt as it is written, and return it with its timing."""
    from transformers import TextStreamer

    where = at_revision(config.model, config.revision), config.device, config.trust_remote_code
    model, tokenizer = load_any(*where, merge=True)
    inputs = encode_prompt(tokenizer, config.prompt, config.chat).to(model.device)
    check_tokens(model, inputs["input_ids"])
    torch.manual_seed(config.seed)
    settings: dict[str, Any] = {"do_sample": config.temperature > 0, "max_new_tokens": config.max_new_tokens}
    if config.temperature > 0:
        settings["temperature"] = config.temperature
    streamer = TextStreamer(tokenizer, skip_prompt=config.chat, skip_special_tokens=True)
    return fast_generate(model, **inputs, streamer=streamer, **settings)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Return token ids and attention mask; `chat` uses the tokenizer's chat template if it has one.

    Raises RequestError if the template cannot be used.
    """
    if chat and tokenizer.chat_template:
        turns, options = [{"role": "user", "content": prompt}], {"return_tensors": "pt", "return_dict": True}
        try:
            return tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options)
        except Exception as error:  # a template is a program; and there may be several, without a default
            raise RequestError(
                f"the chat template does not take a prompt of one user: {first_line(error)}.\n"
                "--no-chat continues the bare prompt."
            ) from None
    return tokenizer(prompt, return_tensors="pt")
