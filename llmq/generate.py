"""python -m llmq.generate: let a model continue a prompt."""

import sys
from functools import partial

from llmq.cli import run
from llmq.runtime.generation import GenerateConfig, generate


def generate_command(config: GenerateConfig) -> None:
    """Print the continuation on stdout, and the tokens per second on stderr."""
    tokens, seconds = generate(config)
    print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s", file=sys.stderr)


main = partial(run, GenerateConfig, generate_command)

if __name__ == "__main__":
    main()
