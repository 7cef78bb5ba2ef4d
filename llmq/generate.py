"""python -m llmq.generate: let a checkpoint continue a prompt."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from llmq.cli import run
from llmq.core.errors import RequestError
from llmq.runtime.load import load_any


@dataclass(frozen=True)
class GenerateConfig:
    """Greedy continuation of a prompt, printed as it comes."""

    model: str
    """A packed checkpoint, or an original model (directory, hub id, .gguf file or `demo`)."""
    prompt: str
    """What to continue; put into the model's chat template where it has one."""
    max_new_tokens: int = 64
    """Stop after this many tokens, or at the model's own end."""
    temperature: float = 0.0
    """0 always takes the likeliest token; 0.7 is livelier."""
    seed: int = 0
    """For temperatures above 0."""
    chat: bool = True
    """Use the chat template; --no-chat continues the bare prompt."""
    device: str = "auto"
    """auto (cuda when present), cpu or cuda."""
    trust_remote_code: bool = False
    """Run modelling code that ships with the model. Only for sources you trust."""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise RequestError("the prompt is empty")
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise RequestError("max new tokens must be at least 1 and temperature at least 0")


def generate_command(config: GenerateConfig) -> None:
    """Load, generate, print; tokens per second on stderr."""
    from transformers import TextStreamer

    model, tokenizer = load_any(config.model, config.device, config.trust_remote_code)
    inputs = encode_prompt(tokenizer, config.prompt, config.chat).to(model.device)
    torch.manual_seed(config.seed)
    sampling: dict[str, Any] = {"do_sample": config.temperature > 0}
    if config.temperature > 0:
        sampling["temperature"] = config.temperature
    streamer = TextStreamer(tokenizer, skip_prompt=config.chat, skip_special_tokens=True)
    started = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=config.max_new_tokens, streamer=streamer, **sampling)
    seconds = time.perf_counter() - started
    new = output.shape[1] - inputs["input_ids"].shape[1]
    print(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s", file=sys.stderr)


def encode_prompt(tokenizer: Any, prompt: str, chat: bool) -> Any:
    """Token ids and mask, through the chat template if there is one and it is wanted."""
    if chat and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return tokenizer(prompt, return_tensors="pt")


def main() -> None:
    """Entry point; the flags are the fields of GenerateConfig."""
    run(GenerateConfig, generate_command)


if __name__ == "__main__":
    main()
