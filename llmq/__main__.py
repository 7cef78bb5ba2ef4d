"""llmq COMMAND …: the same programs as python -m llmq.COMMAND."""

import importlib
import sys

_COMMANDS = {
    "quantize": "quantize a model and write a packed checkpoint",
    "eval": "perplexity of a model, KL to its original",
    "generate": "let a checkpoint continue a prompt",
    "inspect": "what is in a checkpoint, layer by layer",
    "convert": "write a checkpoint in another format, without loss",
    "verify": "is a checkpoint sound, how far is it from its original",
    "tune": "find the fastest kernels for a model's layers on this GPU",
}


def main() -> None:
    """Hand over to the module of the command's name."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command not in _COMMANDS:
        listed = "\n".join(f"  llmq {name:<9} {what}" for name, what in _COMMANDS.items())
        asked = command in ("-h", "--help")
        print(f"commands (each has --help):\n{listed}", file=sys.stdout if asked else sys.stderr)
        if not asked:
            print(f"error: no such command: {command!r}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv = [f"llmq {command}", *sys.argv[2:]]
    importlib.import_module(f"llmq.{command}").main()


if __name__ == "__main__":
    main()
