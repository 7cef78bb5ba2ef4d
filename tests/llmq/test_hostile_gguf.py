"""Damaged .gguf files: llmq.load refuses them in plain words, or computes what transformers' own loader does.

FUZZ_CASES, FUZZ_RANDOM and -rP do what they do in test_hostile.py.
"""

import os
import string
from collections import Counter

import gguf
import hostile
import hostile_gguf
import pytest
import torch
from gguf_models import file_in, known_words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import logits, pack
from tiny import save_tiny
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import llmq
from llmq.core.errors import CheckpointError, RequestError

CASES = int(os.environ.get("FUZZ_CASES", "1000")) // 10
IDS = torch.randint(0, 64, (1, 65), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A tiny Llama in Q4_0 with a few words."""
    root = tmp_path_factory.mktemp("sound")
    save_tiny(root / "llama", "llama-gqa", num_hidden_layers=1, vocab_size=96)
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *string.ascii_letters, "th"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[("t", "h")]))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    made.save_pretrained(root / "llama")
    with known_words():
        return file_in(pack(root / "llama", root / "gguf", format="gguf", group_size=128)).read_bytes()


def opened(path):
    """What llmq.load makes of a file, and its logits; None if it is refused as it should be."""
    try:
        with hostile.bounds():
            model = llmq.load(path, "cpu")
            return logits(model, IDS)
    except (CheckpointError, RequestError) as error:
        hostile.plain_words(error)
        return None


OTHERS = {
    "output.weight": "lm_head.weight",
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.ffn_norm.weight": "model.layers.0.post_attention_layernorm.weight",
}
"""All but the packed linears."""


def reference(path):
    """The logits of a dense model that transformers makes of the file.

    It does not look at divisors of rotary frequencies. And it keeps float32 where llmq takes float16: see GgufFile.
    """
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if divisors := stored.get("rope_freqs.weight"):
        model.model.rotary_emb.inv_freq /= torch.tensor(gguf.dequantize(divisors.data, divisors.tensor_type))
    kinds = {OTHERS[name]: tensor.tensor_type.name for name, tensor in stored.items() if name in OTHERS}
    embeddings = kinds["model.embed_tokens.weight"]
    usual = torch.bfloat16 if embeddings == "BF16" else torch.float16
    for name, parameter in model.named_parameters():
        is_rounded = kinds.get(name) not in ("F32", "BF16") or (parameter.ndim == 1 and embeddings != "F32")
        if name in kinds and is_rounded:
            parameter.data = parameter.to(usual).float()
    return logits(model, IDS)


def test_a_damaged_file_is_refused_or_computes_what_it_says(sound, tmp_path):
    became, path = Counter(), tmp_path / "m.gguf"
    path.write_bytes(sound)
    found = opened(path)
    torch.testing.assert_close(found, reference(path), rtol=0, atol=1e-4)
    assert hostile_gguf.Taken.of(sound).whole() == sound

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        derandomize="FUZZ_RANDOM" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(hostile_gguf.KINDS), st.data())
    def one(damage, data):
        content, must_refuse, what = damage(data.draw, sound)
        path.write_bytes(content)
        found = opened(path)
        became[f"{what}: {'refused' if found is None else 'computed'}"] += 1
        assert found is None or not must_refuse
        if found is not None:
            expected = reference(path)
            size = max([1e-3, *expected[expected.isfinite()].abs().tolist()])
            assert found.shape == expected.shape
            assert torch.allclose(found, expected, rtol=0, atol=1e-3 * size, equal_nan=True)

    one()
    print(f"{became.total()} cases:", *(f"{what} {count}" for what, count in sorted(became.items())), sep="\n  ")
