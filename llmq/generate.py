"""python -m llmq.generate: let a model continue a prompt."""

import sys
from functools import partial

from llmq.cli import run
from llmq.runtime.fast_generation import Timing
from llmq.runtime.generation import GenerateConfig, generate


def generate_command(config: GenerateConfig) -> None:
    """Print the continuation on stdout, and where the time went on stderr."""
    done = generate(config)
    print(timing_line(done.timing), file=sys.stderr)
    if done.plain is not None:
        print(f"each step ran through the model itself, which is slower: {done.plain}", file=sys.stderr)


def timing_line(t: Timing) -> str:
    """Return how long the prompt, the preparation and the new tokens took."""
    if t.prefill_seconds == 0:  # another loop, which tells nothing apart
        return f"{t.new_tokens} tokens in {t.decode_seconds:.1f} s, with the prompt"
    parts = [f"prompt: {t.prompt_tokens} tokens in {t.prefill_seconds:.2f} s"]
    if t.capture_seconds:
        parts.append(f"making the decode step ready: {t.capture_seconds:.2f} s")
    rate = f", {t.decode_rate:.1f} tokens/s after that" if t.decode_rate else ""
    return "; ".join([*parts, f"{t.new_tokens} new tokens{rate}"])


main = partial(run, GenerateConfig, generate_command)

if __name__ == "__main__":
    main()
