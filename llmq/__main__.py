"""llmq COMMAND …: runs the same program as python -m llmq.COMMAND."""

import importlib
import sys

_COMMANDS = {
    "quantize": "quantize a model and write a packed checkpoint",
    "eval": "measure the perplexity of a model, and its KL divergence from the original",
    "generate": "let a model continue a prompt",
    "inspect": "show what a packed checkpoint holds, layer by layer",
    "convert": "write a packed checkpoint in another format, without loss",
    "verify": "check that a packed checkpoint is sound, and compare it with its original",
    "write": "let a model write texts of its own, to train on or to calibrate with",
    "train": "train a model while its weights are quantized",
    "tune": "find the fastest kernels for a model's layers on this GPU",
}


def main() -> None:
    """Run the program that the first argument names; without one, list the programs."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in _COMMANDS:
        listed = "\n".join(f"  llmq {name:<9} {work}" for name, work in _COMMANDS.items())
        asked = command in ("-h", "--help")
        usage = f"usage: llmq COMMAND [OPTIONS]; llmq COMMAND --help lists the options\n{listed}"
        print(usage, file=sys.stdout if asked else sys.stderr)
        if not asked:
            print(f"error: no such command: {command!r}; choose one of those above", file=sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv = [f"llmq {command}", *sys.argv[2:]]
    importlib.import_module(f"llmq.{command}").main()


if __name__ == "__main__":
    main()
