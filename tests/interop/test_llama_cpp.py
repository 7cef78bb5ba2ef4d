"""llama.cpp opens .gguf files and computes what llmq computes (`make interop`)."""

import pytest
import torch
from compare_gguf import Files
from compare_methods import CompareConfig
from dither import DitherConfig, write_dithered
from llama_cpp import Llama, quantize
from test_demo import PARIS

from llmq.core.errors import RequestError, WorkError
from llmq.models.locate import locate
from llmq.runtime.load import load_any

pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def original():
    """Return the demo model in float32, and its tokenizer."""
    return load_any("demo", "cpu", exact=True)


@pytest.fixture(scope="module")
def in_f32(tmp_path_factory):
    """Return the demo model's own .gguf file, which is in Q4_1 and Q8_0, written in F32 by llama.cpp."""
    file = tmp_path_factory.mktemp("f32") / "f32.gguf"
    quantize(locate("demo"), file, "F32", embeddings="F32")
    return file


def kl(model, logits, ids):
    """Return the mean KL divergence of llama.cpp's predictions from the model's."""
    with torch.no_grad():
        q = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float((q.exp() * (q - torch.tensor(logits).double().log_softmax(-1))).sum(-1).mean())


def test_a_text_has_the_same_tokens_and_the_same_continuation(original, in_f32):
    model, tokenizer = original
    with Llama(in_f32) as llama:
        ids = llama.tokenize(PARIS)
        assert ids == tokenizer(PARIS)["input_ids"]
        new = llama.generate(ids, 16)
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)
    assert new == theirs[0, len(ids) :].tolist()


def test_logits_are_those_of_the_same_weights_in_float32(original, in_f32):
    """With quantized weights llama.cpp rounds activations to int8: KL 2.6e-3. With float32 weights it does not.

    llmq reads .gguf files in float16, in which KL is 1.4e-6 (2-core AVX2 machine, 2026-11-29).
    """
    model, tokenizer = original
    ids = tokenizer(PARIS)["input_ids"]
    with Llama(locate("demo")) as llama:
        assert kl(model, llama.logits(ids), ids) < 1e-2
    model, _ = load_any(str(in_f32), "cpu", exact=True)
    with Llama(in_f32) as llama:
        logits = llama.logits(ids)
        assert logits.shape == (len(ids), model.config.vocab_size)
        assert kl(model, logits, ids) < 1e-9
        assert (llama.logits(ids[:10]) == logits[:10]).all()  # nothing is left of the first sequence


def test_compared_files_are_evaluated_with_the_weights_that_llama_cpp_computes_with(tmp_path):
    (tmp_path / "text.txt").write_text(PARIS)
    write_dithered(DitherConfig(tmp_path / "model"))
    config = CompareConfig(str(tmp_path / "model"), str(tmp_path / "text.txt"), samples=1, sequence_length=64)
    files = Files(config, tmp_path)
    files.prepare(with_importance=True)
    ids = files.source.tokenizer(PARIS)["input_ids"]
    weights = set()
    for flags in ("Q4_0 --pure", "Q4_0 --pure --imatrix"):
        row = files.quantized(flags)
        assert row["types"] == {"Q4_0": 210}
        assert row["bits_per_weight"] == 4.5
        weights.add(float(files.linears["model.layers.0.self_attn.q_proj"].weight.abs().sum()))
        with Llama(files.made) as llama:
            # It rounds activations to int8. Measured: 3.3e-3 and 2.9e-3 (2-core AVX2 machine, 2026-11-29).
            assert kl(files.model, llama.logits(ids), ids) < 1e-2
    assert len(weights) == 2  # the matrix makes a difference


def test_speed_is_positive_and_prefill_is_faster_than_decoding(original):
    with Llama(locate("demo")) as llama:
        speed = llama.speed(original[1](PARIS)["input_ids"], 8)
    assert speed.prefill > speed.decode > 0


def test_what_cannot_be_done_ends_in_one_line(tmp_path):
    with pytest.raises(WorkError, match=r"^llama.cpp cannot open .*missing.gguf: .*failed to load model.*$"):
        Llama(tmp_path / "missing.gguf")
    with pytest.raises(WorkError, match=r"cannot write .* as Q4_0: .*requantizing from type q8_0 is disabled$"):
        quantize(locate("demo"), tmp_path / "again.gguf", "Q4_0")
    with Llama(locate("demo")) as llama, pytest.raises(RequestError, match="tokens must be some numbers below 49152"):
        llama.logits([49152])
