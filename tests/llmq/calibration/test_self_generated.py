"""The model writes its own calibration text: seeded, and from its own distribution."""

import torch
from small_runs import run
from tiny import tiny_model
from transformers import AutoModelForCausalLM, FalconConfig

from llmq.calibration.self_generated import SELF, _Draw, sample_sequences
from llmq.calibration.texts import hold_out
from llmq.core.settings import Calibration
from llmq.runtime.load import load_any


def settings(samples=7, length=24, seed=0):
    return Calibration(SELF, samples, length, seed)


def test_the_seed_alone_decides_what_is_written():
    model = tiny_model("llama-gqa")
    first, again, other = (sample_sequences(model, None, settings(seed=seed)) for seed in (1, 1, 2))
    assert first.shape == (7, 24)
    assert first.dtype == torch.int64
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    model = tiny_model("llama-gqa")  # sets the seed
    before = torch.get_rng_state()
    sample_sequences(model, None, settings())
    assert torch.equal(torch.get_rng_state(), before)


def test_texts_begin_with_bos_and_go_on_beyond_their_end():
    model = tiny_model("llama-gqa")
    plain = sample_sequences(model, 5, settings())
    model.generation_config.eos_token_id = list(range(384))  # every token would end it
    model.generation_config.update(min_p=0.9, num_beams=3, stop_strings=["a"], suppress_tokens=[7])
    written = sample_sequences(model, 5, settings())
    assert (written[:, 0] == 5).all()
    assert written.shape == (7, 24)
    assert torch.equal(written, plain)
    assert len({tuple(row) for row in written.tolist()}) == 7
    assert (sample_sequences(model, None, settings())[:, 0] != 5).any()


def test_a_model_whose_biases_grow_with_the_text_writes_too():
    shape = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(FalconConfig(**shape, alibi=True)).eval()
    assert sample_sequences(model, 5, settings()).shape == (7, 24)


def test_a_small_budget_of_memory_changes_nothing_but_the_batches(monkeypatch):
    sizes = []
    model = tiny_model("llama-gqa")
    model.register_forward_pre_hook(lambda _, a, k: sizes.append(len(k["input_ids"])), with_kwargs=True)
    monkeypatch.setattr("llmq.calibration.self_generated._CACHE_BYTES", {"cpu": 3 * 24 * 2 * 4 * 2 * 2 * 16})
    assert sample_sequences(model, None, settings()).shape == (7, 24)
    assert set(sizes) == {3, 1}


def test_the_first_tokens_are_drawn_hotter_than_the_rest():
    scores = torch.tensor([1.0, 2.0, 4.0, 0.0]).log().expand(60_000, 4)
    torch.manual_seed(0)
    for length, temperature in ((1, 2.0), (9, 1.5), (17, 1.0), (99, 1.0)):
        drawn = _Draw()(torch.zeros(len(scores), length).long(), scores)
        assert (drawn.isfinite().sum(1) == 1).all()
        share = drawn.argmax(1).bincount(minlength=4) / len(drawn)
        torch.testing.assert_close(share, (scores[0] / temperature).softmax(-1), rtol=0, atol=0.01)
        assert share[3] == 0


def test_min_p_leaves_out_what_is_unlikely_beside_the_likeliest():
    scores = torch.tensor([11.0, 50.0, 100.0, 9.0]).log().expand(60_000, 4)
    torch.manual_seed(0)
    drawn = _Draw(0.1)(torch.zeros(len(scores), 30).long(), scores).argmax(1).bincount(minlength=4) / len(scores)
    torch.testing.assert_close(drawn, torch.tensor([11.0, 50.0, 100.0, 0.0]) / 161, rtol=0, atol=0.01)
    assert drawn[3] == 0
    hot = _Draw(0.5)(torch.zeros(len(scores), 1).long(), scores).argmax(1).bincount(minlength=4)
    assert (hot > 0).all()  # the first token may be any


def test_a_model_is_quantized_on_its_own_text(tmp_path, llama, text_file, monkeypatch):
    seen = []
    monkeypatch.setattr("llmq.core.device.multiplies_bfloat16", lambda _: False)
    monkeypatch.setattr("llmq.run.prepare.hold_out", lambda sequences: seen.append(sequences) or hold_out(sequences))
    run(llama, SELF, tmp_path / "out", samples=12)
    written = sample_sequences(load_any(str(llama), "cpu")[0], None, Calibration(SELF, 12, 32))
    assert torch.equal(seen[0], written)
