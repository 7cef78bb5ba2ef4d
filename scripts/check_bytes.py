"""Print the SHA-256 of the weights that each method writes. A refactoring must not change any line of the output.

    python scripts/check_bytes.py > before.txt          in a checkout of the old code
    python scripts/check_bytes.py | diff before.txt -   in the new code, on the same machine

The model is a tiny random Llama. The text is Python's own documentation. The script uses only llmq's public names, so
it runs on old and on new code. Other processors and other versions of torch give other bytes.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llmq

_SETTINGS: dict[str, Any] = {
    "calibration": "pydoc",
    "samples": 12,
    "sequence_length": 96,
    "group_size": 32,
    "device": "cpu",
}
CASES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn, hessian grid": {"method": "rtn", "grid": "hessian"},
    "gptq, fast": {"effort": "fast"},
    "gptq": {},
    "gptq, best": {"effort": "best"},
    "gptq, 3 bit": {"bits": 3},
    "gptq, asymmetric": {"symmetric": False},
    "gptq, other bits for some layers": {"layer_bits": ("down_proj=8",)},
    "awq": {"method": "awq"},
    "awq, fast": {"method": "awq", "effort": "fast"},
    "awq+gptq": {"method": "awq+gptq"},
    "gptq, in format gptq": {"format": "gptq"},
    "gptq, in format awq": {"format": "awq"},
}


def make_model(directory: Path) -> Path:
    """Save a random Llama of three blocks with a tokenizer of one token per byte. Returns the directory."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 4 if parameter.ndim == 2 else parameter + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def hash_of(directory: Path) -> str:
    """Return the SHA-256 of the names and bytes of all weight files in a checkpoint."""
    hashed = hashlib.sha256()
    for path in sorted(directory.glob("model*.safetensors")):
        hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()


def main() -> None:
    """Print one line for each case."""
    with tempfile.TemporaryDirectory() as room:
        model = make_model(Path(room) / "model")
        for i, (name, settings) in enumerate(CASES.items()):
            print(name, file=sys.stderr)
            output = Path(room) / str(i)
            llmq.quantize(llmq.QuantizeConfig(**{"model": str(model), "output": output} | _SETTINGS | settings))
            print(f"{hash_of(output)}  {name}", flush=True)


if __name__ == "__main__":
    main()
