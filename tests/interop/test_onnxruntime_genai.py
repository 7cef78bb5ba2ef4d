"""onnxruntime-genai's builder takes over codes, scales and zero points, and its model computes the same."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from engine_bytes import packed_bytes, relative
from packed import dequantized_model, logits, pack, some_tokens
from tiny import save_tiny

from llmq.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.peers

# Its defaults round embeddings and head to 4 bit, and activations to int8.
EXACT = ("nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "accuracy_level=1")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Save a tiny model with biases and tied embeddings."""
    return save_tiny(tmp_path_factory.mktemp("source") / "model", "qwen2", torch.float16)


def built(directory):
    """Return the directory of the ONNX model that its builder makes of a checkpoint."""
    output = directory.with_name("onnx")
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", directory, "-o", output]
    options = ["-p", "int4", "-e", "cpu", "-c", directory.with_name("cache"), "--extra_options", *EXACT]
    done = subprocess.run([*builder, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output


def linears_of(directory):
    """Return {name: (codes, scales, zero points)} of the packed linears of an ONNX model."""
    import onnx

    graph = onnx.load(directory / "model.onnx").graph
    constants = {constant.name: constant for constant in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    return {
        node.name.strip("/").replace("/", ".").replace(".attn.", ".self_attn.").removesuffix(".MatMulNBits"): [
            onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:4]
        ]
        for node in nodes
    }


def weights_of(directory):
    """Return (codes, scales, zero points, bits) by the names of the builder, which stacks the rows of q, k and v."""
    checkpoint, weights = Checkpoint(directory), {}
    for name in sorted(checkpoint.linears, key=lambda name: "qkv".find(name[-6])):
        stacked = re.sub("[qkv]_proj", "qkv_proj", name)
        weights.setdefault(stacked, []).append(checkpoint.weight(name))
    return {
        name: (*(torch.cat([getattr(w, part) for w in rows]) for part in ("q", "scale", "zero")), rows[0].bits)
        for name, rows in weights.items()
    }


def check_taken_over(directory, output, zero_of=lambda zero: zero):
    """Assert that the ONNX model holds our codes and scales, and `zero_of` our zero points."""
    found, expected = linears_of(output), weights_of(directory)
    assert found.keys() == expected.keys()
    for name, (q, scale, zero, bits) in expected.items():
        codes, scales, zeros = (array.reshape(len(q), -1) for array in found[name])
        assert np.array_equal(codes, packed_bytes(q, bits)), name
        assert np.array_equal(scales, scale.float().numpy()), name
        assert np.array_equal(zeros, packed_bytes(zero_of(zero), bits)), name


@pytest.mark.parametrize(("bits", "form", "symmetric"), [(2, "gptq", True), (8, "gptq", True), (4, "awq", False)])
def test_it_takes_over_codes_scales_and_zero_points(source, tmp_path, bits, form, symmetric):
    directory = pack(source, tmp_path / "packed", format=form, bits=bits, symmetric=symmetric)
    check_taken_over(directory, built(directory))


def test_it_reads_asymmetric_gptq_wrongly_as_we_tell(source, tmp_path):
    """If this fails, ASYMMETRIC_NOTE in llmq/formats/gptq.py may be out of date."""
    directory = pack(source, tmp_path / "packed", format="gptq", symmetric=False)
    check_taken_over(directory, built(directory), lambda zero: (zero + 1) % 16)


@torch.no_grad()
def test_its_model_computes_what_the_dequantized_weights_do(source, tmp_path):
    import onnxruntime_genai

    directory = pack(source, tmp_path / "packed", format="gptq")
    output = built(directory)
    check_taken_over(directory, output)
    model = onnxruntime_genai.Model(str(output))
    generator = onnxruntime_genai.Generator(model, onnxruntime_genai.GeneratorParams(model))
    ids = some_tokens(1)
    generator.append_tokens(ids.numpy().astype(np.int32))
    found = torch.from_numpy(generator.get_output("logits")).float()
    assert relative(found, logits(dequantized_model(source, directory), ids)) < 1e-5
