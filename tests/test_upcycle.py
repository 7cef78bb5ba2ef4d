"""Check that the script that makes a mixture of experts makes one that computes what the dense model does."""

import importlib

import pytest
import torch
import upcycle
from commands import error_of, run_here
from safetensors.torch import load_file
from tiny import save_tiny
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, MixtralForCausalLM
from upcycle import UpcycleConfig, centroids

from llmq.runtime.evaluation import logits_of

SHORT = {"samples": 4, "sequence_length": 64, "limit": 2}
LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def upcycled(model, output, text, **options):
    options = {"experts": 4, "calibration": str(text), "text": str(text)} | SHORT | options
    upcycle.upcycle(UpcycleConfig(output, str(model), **options))
    return load_file(output / "model.safetensors")


@pytest.fixture(scope="module")
def mixture(llama, text_file, tmp_path_factory):
    """Make a mixture of four experts from the tiny Llama. Returns its directory."""
    output = tmp_path_factory.mktemp("upcycled") / "mixture"
    upcycled(llama, output, text_file)
    return output


def test_its_tensors_have_the_names_that_transformers_writes(mixture, tmp_path):
    model = MixtralForCausalLM.from_pretrained(mixture)
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(path / "model.safetensors") for path in (mixture, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_all_but_experts_and_routers_is_what_dither_writes(mixture, llama, tmp_path):
    seed = UpcycleConfig(tmp_path).seed
    done = run_here("dither", "--model", llama, "--seed", seed, "--output", tmp_path / "dense")
    assert done.returncode == 0, done.stderr
    ours, dense = (load_file(path / "model.safetensors") for path in (mixture, tmp_path / "dense"))
    outside = {name for name in ours if "block_sparse_moe" not in name}
    assert outside == {name for name in dense if ".mlp." not in name}
    assert all(torch.equal(ours[name], dense[name]) for name in outside)


def test_each_expert_is_the_mlp_within_half_a_cell_and_no_two_are_equal(mixture, llama):
    ours, original = (load_file(path / "model.safetensors") for path in (mixture, llama))
    for layer in range(2):
        for letter, linear in LINEARS.items():
            w = original[f"model.layers.{layer}.mlp.{linear}.weight"].unflatten(1, (-1, 32))
            cell = (w.amax(-1) - w.amin(-1)) / 15
            moves = []
            for e in range(4):
                expert = ours[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{letter}.weight"]
                moves.append((expert.unflatten(1, (-1, 32)) - w) / cell[..., None])
            moves = torch.stack(moves).flatten(1)
            assert moves.abs().max() <= 0.5001
            assert (torch.corrcoef(moves) - torch.eye(4)).abs().max() < 0.1  # each has its own seed


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize(
    "changes", [{}, {"head_dim": 32, "rms_norm_eps": 0.1, "tie_word_embeddings": True, "rope_theta": 50.0}]
)
def test_experts_that_are_not_moved_give_the_logits_of_the_dense_model(
    changes, top_k, text_file, tmp_path, monkeypatch
):
    for module in (importlib.import_module("dither"), upcycle):
        monkeypatch.setattr(module, "dither", lambda w, generator: w)
    dense = save_tiny(tmp_path / "dense", "llama-gqa", **changes)
    upcycled(dense, tmp_path / "mixture", text_file, top_k=top_k)
    ids = torch.arange(2, 102)
    with torch.no_grad():
        models = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("dense", "mixture"))
        expected, got = (logits_of(model)(0, ids) for model in models)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_second_of_two_experts_has_a_weight_of_0_3_for_the_median_token():
    x = torch.randn(2000, 48, generator=torch.Generator().manual_seed(0)) + 2
    weight = upcycle._router(x, UpcycleConfig(upcycle.Path("unused"), experts=6))
    second = (x @ weight.T).topk(2).values.softmax(1)[:, 1]
    assert float(second.median()) == pytest.approx(0.3, abs=1e-4)
    assert second.min() < 0.05  # some tokens have a clear favourite


def test_each_centroid_of_k_means_is_the_mean_direction_of_the_points_nearest_to_it_by_angle():
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 32, generator=generator)
    which = torch.arange(3).repeat_interleave(torch.tensor([600, 60, 6]))
    points = directions[which] + 0.5 * torch.randn(666, 32, generator=generator)
    found = centroids(points * 9 * torch.rand(666, 1, generator=generator), 5, torch.Generator().manual_seed(7))
    directions = normalize(points)
    nearest = torch.cdist(directions, found).argmin(1)
    means = torch.stack([directions[nearest == e].mean(0) for e in range(5)])
    torch.testing.assert_close(found, normalize(means))


def test_k_means_of_repeated_points_gives_no_centroid_twice_and_says_if_they_are_too_few():
    points = torch.eye(4).repeat(50, 1)
    found = centroids(points, 4, torch.Generator().manual_seed(0))
    assert torch.equal(found[found.argmax(1).argsort()].sum(0), torch.ones(4))
    assert found.argmax(1).unique().numel() == 4
    with pytest.raises(upcycle.RequestError, match="4 different tokens are too few for 5 experts"):
        centroids(points, 5, torch.Generator().manual_seed(0))


def test_the_seed_alone_decides_on_the_weights(mixture, llama, text_file, tmp_path):
    first = load_file(mixture / "model.safetensors")
    same = upcycled(llama, tmp_path / "same", text_file)
    other = upcycled(llama, tmp_path / "other", text_file, seed=1)
    assert all(torch.equal(tensor, same[name]) for name, tensor in first.items())
    assert {n for n in first if not torch.equal(first[n], other[n])} == {n for n in first if first[n].ndim == 2} - {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }


def test_the_command_prints_a_small_divergence_and_the_share_of_each_layer(llama, text_file, tmp_path):
    paths = ["--model", llama, "--output", tmp_path / "made", "--calibration", text_file, "--text", "pytopics"]
    done = run_here("upcycle", *paths, "--samples", 4, "--sequence-length", 64, "--limit", 2)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert 0 < float(lines[1].split()[-4]) < 0.5
    assert lines[1].endswith("nats per token")
    for line in lines[-2:]:
        for cell in line.split("|")[2:4]:
            least, median, most = map(float, cell.split(","))
            assert 0 <= least <= median <= 0.125 < most < 1 / 2 + 1e-3  # a token counts once for one of its two


@pytest.mark.parametrize("options", [["--top-k", 9], ["--top-k", 0], ["--experts", 1, "--top-k", 1]])
def test_impossible_numbers_of_experts_are_refused(options, tmp_path):
    done = run_here("upcycle", "--output", tmp_path / "made", *options)
    assert done.returncode == 2
    assert "top-k must be between 1 and their number; got" in error_of(done)


def test_a_model_that_is_no_llama_is_refused_and_nothing_is_written(gemma, tmp_path):
    done = run_here("upcycle", "--model", gemma, "--output", tmp_path / "made")
    assert done.returncode == 2
    assert "is no Llama without biases" in error_of(done)
    assert not (tmp_path / "made").exists()
