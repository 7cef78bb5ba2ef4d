"""llama.cpp runs the .gguf files that llmq writes, and computes what llmq does (`make interop`)."""

import pytest
import torch
from bench_engines import BenchEnginesConfig, bench
from llama_cpp import Llama, quantize
from packed import logits, pack
from test_demo import PARIS
from test_llama_cpp import kl

from llmq.models.locate import gguf_in
from llmq.run.convert import ConvertConfig, convert
from llmq.runtime.load import load_any

pytestmark = pytest.mark.peers

# How far llama.cpp's predictions may be from llmq's: it rounds activations to int8.
_OF_ACTIVATIONS = 0.01
KINDS = {"Q4_0": {}, "Q4_0, Q2_0 and Q8_0": {"layer_bits": ("layers.0.*=2", "layers.1.*=8")}}


@pytest.fixture(scope="module", params=KINDS)
def ours(request, tmp_path_factory):
    """Return a .gguf file that llmq wrote of the demo model; and the model and tokenizer that llmq reads in it."""
    directory = pack(
        "demo", tmp_path_factory.mktemp("gguf") / "out", format="gguf", group_size=128, **KINDS[request.param]
    )
    return gguf_in(directory), *load_any(str(directory), "cpu", exact=True)


def test_a_file_of_llmq_holds_the_weights_that_llmq_computes_with(ours, tmp_path):
    file, model, tokenizer = ours
    quantize(file, tmp_path / "f32.gguf", "F32", embeddings="F32")
    ids = tokenizer(PARIS, return_tensors="pt")["input_ids"]
    with Llama(tmp_path / "f32.gguf") as llama:
        found = torch.from_numpy(llama.logits(ids[0].tolist()))
    expected = logits(model, ids)[0]
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_llama_cpp_predicts_with_it_what_llmq_does_but_for_rounded_activations(ours):
    file, model, tokenizer = ours
    ids = tokenizer(PARIS)["input_ids"]
    with Llama(file) as llama:
        assert llama.tokenize(PARIS) == ids
        assert 0 < kl(model, llama.logits(ids), ids) < _OF_ACTIVATIONS


def test_it_writes_the_same_answer(ours):
    file, model, tokenizer = ours
    question = [{"role": "user", "content": "Name the capital of France."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    with Llama(file) as llama:
        assert llama.generate(prompt, len(answer)) == answer


@pytest.mark.parametrize("ours", ["Q4_0"], indirect=True)
def test_the_speed_of_the_same_codes_is_measured_in_three_engines(ours, tmp_path, capsys):
    packed = convert(ConvertConfig(ours[0], tmp_path / "packed", "compressed-tensors"))
    mlx = convert(ConvertConfig(packed, tmp_path / "mlx", "mlx"))
    bench(BenchEnginesConfig(packed, ours[0], mlx, prompt_tokens=16, tokens=4, runs=1))
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [name.strip() for name, _, _ in rows] == ["llmq", "llama.cpp", "MLX"]
    assert all(float(speed) > 0 for _, *speeds in rows for speed in speeds)
