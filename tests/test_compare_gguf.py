"""Check the script that compares llmq with llama.cpp's quantizer, without llama.cpp: all rows are there already."""

import json
import math

import pytest
import torch
from compare_gguf import CompareGgufConfig, compare, mean_squares
from compare_methods import CompareConfig, common
from tiny import save_tiny

from llmq.core.errors import WorkError
from llmq.models.model_source import ModelSource

KL = {"Q4_0 --pure": 1.0, "Q4_0 --pure --imatrix": 0.56, "Q4_K_M": 0.36, "Q4_K_M --imatrix": 0.3, "Q8_0 --pure": 0.01}
KL |= {"IQ4_NL --pure --imatrix": 0.5, "Q2_0 --pure": 8.0}


def compare_rows(directory, changes=None, bytes_of_q4_k_m=141):
    """Compare rows of a model with 320 weights, which take 180 bytes in Q4_0 (220 with Q8_0), and 1000 other bytes."""
    kl = KL | {"llmq": 0.28} | (changes or {})
    config = CompareGgufConfig("valid.txt", "test.txt", directory, results=directory / "rows.jsonl")
    settings = common(CompareConfig(str(directory), "valid.txt", "test.txt", limit=4))
    shared = {"settings": settings, "seed": 0, "perplexity": 20.0, "original_perplexity": 19.0, "packed_weights": 320}
    for flags in KL:
        linear = 80 + bytes_of_q4_k_m if flags.startswith("Q4_K_M") else 180
        row = {
            "name": f"llama.cpp {flags}",
            "flags": flags,
            "bits": int(flags.partition("Q")[2][0]),
            "group_size": 0,
            "kl": kl[flags],
        }
        row |= {"types": {"Q5_0": 2, "Q8_0": 1}, "linear_bytes": linear, "file_bytes": linear + 1000}
        write(config.results, shared | row)
    mixed = ("gptq, down_proj in 8 bit", "gptq --layer-bits down_proj=8", 4, 32, 5.5)
    for name, method, bits, group, size in (
        ("rtn", "rtn", 4, 32, 4.5),
        ("gptq", "gptq", 4, 32, 4.5),
        mixed,
        ("gptq", "gptq", 2, 64, 2.25),
        ("rtn", "rtn", 8, 32, 8.5),
    ):
        row = {"name": f"llmq {name}", "flags": f"--method {method}", "bits": bits, "group_size": group}
        # compressed-tensors stores two numbers of 8 bytes for each of the three linears.
        write(config.results, shared | row | {"kl": kl["llmq"], "bits_per_weight": size + 3 * 16 * 8 / 320})
    compare(config)


def write(results, row):
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_rows_that_satisfy_every_claim_pass(tmp_path, capsys):
    compare_rows(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("\nholds ") == 4
    assert "holds     0.500 <= 0.5      KL of llmq's Q4_0 / of llama.cpp Q4_0 --pure --imatrix" in printed
    assert "| llama.cpp Q4_K_M | 2 Q5_0, 1 Q8_0 | 5.53 | 0.0 MB | 0.0 MB | 0.3600 | 20.000 |" in printed
    for types, bits in (("Q4_0", "4.50"), ("Q4_0, Q8_0", "5.50"), ("Q2_0", "2.25"), ("Q8_0", "8.50")):
        assert f"| {types} | {bits} |" in printed


@pytest.mark.parametrize(
    ("changes", "bytes_of_q4_k_m", "claim"),
    [
        ({"Q4_0 --pure": 0.99}, 141, "llama.cpp Q4_0 --pure"),
        ({"Q4_0 --pure --imatrix": 0.55}, 141, "llama.cpp Q4_0 --pure --imatrix"),
        ({"Q4_K_M": math.nan}, 141, "KL of llmq's Q4_0, down_proj in Q8_0 / of llama.cpp Q4_K_M"),
        ({}, 140, "bytes of llmq's Q4_0, down_proj in Q8_0 / of llama.cpp Q4_K_M"),
    ],
)
def test_a_claim_that_does_not_hold_is_named_and_is_an_error(tmp_path, capsys, changes, bytes_of_q4_k_m, claim):
    with pytest.raises(WorkError, match="1 claims do not hold"):
        compare_rows(tmp_path, changes, bytes_of_q4_k_m)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILS"))
    assert line.endswith(claim)


def test_the_importance_matrix_is_the_mean_square_of_the_inputs_over_all_tokens(tmp_path):
    model = ModelSource(str(save_tiny(tmp_path / "model"))).load_all(torch.device("cpu"), torch.float32)
    name = "model.layers.0.self_attn.q_proj"  # its input is the norm of the embeddings
    sequences = torch.arange(12).view(3, 4)
    with torch.no_grad():
        inputs = model.model.layers[0].input_layernorm(model.model.embed_tokens(sequences)).flatten(0, 1)
    squares = mean_squares(model, {name: model.get_submodule(name)}, sequences)
    torch.testing.assert_close(squares, {name: inputs.square().mean(0)})
