import pytest
from small_runs import run
from tiny import save_tiny
from trainings import train

from llmq.core.errors import RequestError


def test_the_original_of_another_model_is_refused(packed, deep_llama, text, tmp_path):
    other = save_tiny(tmp_path / "other", "llama-gqa", vocab_size=256)
    with pytest.raises(RequestError, match="another model"):
        train(packed, text, tmp_path / "out", loss="kl", original=str(other))
    wider = save_tiny(tmp_path / "wider", "llama-gqa", intermediate_size=128)
    with pytest.raises(RequestError, match=r"down_proj of the original is \(64, 128\)"):
        train(packed, text, tmp_path / "out", loss="kl", original=str(wider))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 7}, "bits must be one of"),
        ({"bits": 3, "format": "awq"}, "awq"),
        ({"original": "other"}, "an original model is its own"),
        ({"lora": 4}, "needs a packed checkpoint"),
        ({"calibration_samples": 9999}, "Lower --calibration-samples"),
        ({"activations": 8, "format": "gptq"}, "cannot say that inputs are rounded"),
        ({"activations": 8, "symmetric": False}, "zero points are refused .* or --no-symmetric"),
    ],
)
def test_a_wrong_request_for_an_original_model_is_refused_and_leaves_nothing(options, words, llama, text, tmp_path):
    with pytest.raises(RequestError, match=words):
        train(llama, text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "kl"}, "--original"),
        ({"bits": 3}, "bits has no effect"),
        ({"symmetric": False}, "symmetric has no effect"),
        ({"calibration": "pydoc"}, "calibration has no effect"),
        ({"rate": 0.1}, "rate has no effect"),
        ({"lora_rate": 0.1}, "lora rate has no effect"),
        ({"scale_rate": 0.0}, "nothing would learn"),
        ({"lora": 4, "calibration_samples": 9999}, "Lower --calibration-samples"),
        ({"train_layers": ","}, "names no layer"),
        ({"sequence_length": 4096}, "context of 256 tokens"),
        ({"train_layers": "nothing"}, "no packed layer"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_leaves_nothing(options, words, packed, text, tmp_path):
    with pytest.raises(RequestError, match=words):
        train(packed, text, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_zero_points_of_a_packed_checkpoint_are_refused_beside_8_bit_inputs(llama, text, tmp_path):
    packed = run(llama, text, tmp_path / "packed", bits=4, symmetric=False, format="compressed-tensors")
    with pytest.raises(RequestError, match="zero points are refused"):
        train(packed, text, tmp_path / "out", activations=8)
    assert not (tmp_path / "out").exists()
