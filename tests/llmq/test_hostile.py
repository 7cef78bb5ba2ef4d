"""Checkpoints of strangers: whatever is in their files, llmq.load refuses them in plain words or does what they say.

A thousand damaged copies of sound checkpoints are opened. A copy may load only if it computes what a plain reference
does: a dense transformers model of the config as it now stands, whose weights tests/plain.py decodes from the tensors
as they now are, under the bits and the group size with which the sound copy was packed. So a change of the model's
settings may change the logits in the way transformers says, a change of tensors in the way their bytes say, and a
change of quantization_config not at all.

FUZZ_CASES sets how many; FUZZ_RANDOM=1 draws others in every run; -rP prints what became of each kind of damage.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile
import plain
import pytest
import torch
from hf_checkpoints import TABLE, with_packed_weight
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed import logits, pack, rewrite
from safetensors.torch import load_file, save_file
from tiny import save_tiny

import llmq
from llmq.core.errors import CheckpointError, RequestError
from llmq.runtime.packed_linear import PackedLinear

CASES = int(os.environ.get("FUZZ_CASES", "1000"))
IDS = torch.randint(0, 64, (1, 65), generator=torch.Generator().manual_seed(0))


@dataclass
class Sound:
    """A sound checkpoint, and how it was packed."""

    files: hostile.Files
    kind: str
    bits: int
    group_size: int
    dense: Any = None
    """The reference for its config.json."""


def _act_order(directory: Path) -> None:
    """Spread the groups of a GPTQ checkpoint over the rows."""
    shuffle = lambda t: t[torch.randperm(len(t), generator=torch.Generator().manual_seed(1))]  # noqa: E731
    rewrite(directory, lambda ts: ts.update({n: shuffle(t) for n, t in ts.items() if n.endswith("g_idx")}))
    _requantize(directory, desc_act=True)


def _requantize(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


def _shard(directory: Path) -> None:
    """Cut a checkpoint of one file into two, with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, mine in parts.items():
        save_file({name: tensors[name] for name in mine}, directory / shard, metadata={"format": "pt"})
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: shard for shard, mine in parts.items() for name in mine}}
    (directory / hostile.INDEX).write_text(json.dumps(index, indent=2))


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """One small checkpoint of each format; among them shards, tied embeddings, biases, odd bits and act order."""
    root = tmp_path_factory.mktemp("sound")
    options = {"num_hidden_layers": 1, "vocab_size": 64}
    llama, qwen = save_tiny(root / "llama", "llama-gqa", **options), save_tiny(root / "qwen", "qwen2", **options)
    made = {
        "compressed-tensors": (pack(qwen, root / "a"), "compressed-tensors", 4),
        "gptq": (pack(llama, root / "b", format="gptq", bits=3), "gptq", 3),
        "awq": (pack(llama, root / "c", format="awq", symmetric=False), "awq", 4),
        "auto-round": (pack(llama, root / "d", format="gptq"), "gptq", 4),
        "mlx": (with_packed_weight(qwen, root / "e", TABLE, 3, 3)[0], "mlx", 3),
    }
    _shard(root / "a")
    _act_order(root / "b")
    _requantize(root / "d", quant_method="auto-round", packing_format="auto_round:auto_gptq")
    kept = ("config.json", "generation_config.json", "quantize_config.json", hostile.INDEX)
    found = {}
    for name, (directory, kind, bits) in made.items():
        paths = [path for path in directory.iterdir() if path.name in kept or path.suffix == ".safetensors"]
        found[name] = Sound({path.name: path.read_bytes() for path in paths}, kind, bits, 32)
    return found


OPENED: list[str] = []
sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def opened(directory: Path) -> tuple[Any, torch.Tensor] | None:
    """What llmq.load makes of a directory, and its logits; None if it is refused as it should be."""
    OPENED.clear()
    try:
        with hostile.bounds():
            model = llmq.load(directory, "cpu")
            return model, logits(model, IDS)
    except (CheckpointError, RequestError) as error:
        message = hostile.plain_words(error)
        if isinstance(error, RequestError):
            assert "describes no" in message or "holds neither" in message or "not a causal" in message, message
        return None
    finally:
        assert not [path for path in OPENED if hostile.OUTSIDE in path]


def same_as_reference(found: tuple[Any, torch.Tensor], original: Sound, directory: Path) -> None:
    model, actual = found
    same_config = (directory / "config.json").read_bytes() == original.files["config.json"]
    if same_config and original.dense is not None:
        reference = original.dense
    else:
        reference = plain.dense_model(directory, directory.parent / "scratch")
    if same_config:
        original.dense = reference
    dense = plain.decode(plain.read_tensors(directory), original.kind, original.bits, original.group_size)
    plain.fill(reference, dense)
    state = model.state_dict()
    for name, expected in dense.items():
        module = dict(model.named_modules()).get(name.removesuffix(".weight"))
        if isinstance(module, PackedLinear):
            # An asymmetric weight whose scales were float32 keeps 16 significant bits of them.
            torch.testing.assert_close(module.dequantize(), expected, rtol=2e-5, atol=0, equal_nan=True)
        elif name in state:
            assert torch.equal(state[name].nan_to_num(7), expected.nan_to_num(7)), name
    expected = logits(reference, IDS)
    size = max([1e-3, *expected[expected.isfinite()].abs().tolist()])
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=0, atol=1e-3 * size, equal_nan=True):
        assert actual.shape == expected.shape
        # Damaged weights may be so large that float32 is not enough: then the reference does not agree with itself.
        noise = float((logits(reference.double(), IDS) - expected).abs().nan_to_num(float("inf")).max())
        reference.float()
        assert float((actual - expected).abs().nan_to_num(float("inf")).max()) <= 10 * noise


FORMATS = ["compressed-tensors", "gptq", "awq", "auto-round", "mlx"]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile")


@pytest.mark.parametrize("name", FORMATS)
def test_the_sound_checkpoints_load_and_are_what_the_plain_reference_says(sound, place, name):
    directory = place / f"sound-{name}"
    hostile.write(sound[name].files, directory)
    found = opened(directory)
    assert found is not None
    same_as_reference(found, sound[name], directory)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_checkpoint_is_refused_or_computes_what_its_files_say(sound, place, name):
    became: Counter[str] = Counter()
    root = place / name
    root.mkdir()
    hostile.write(sound[name].files, root / hostile.OUTSIDE)

    @settings(
        max_examples=CASES // len(FORMATS),
        deadline=None,
        database=None,
        derandomize="FUZZ_RANDOM" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(hostile.KINDS), st.data())
    def one(damage, data):
        files = dict(sound[name].files)
        must_refuse = damage(data.draw, files)
        shutil.rmtree(root / "damaged", ignore_errors=True)
        hostile.write(files, root / "damaged")
        found = opened(root / "damaged")
        became[f"{damage.__name__}: {'refused' if found is None else 'computed'}"] += 1
        assert found is None or not must_refuse
        if found is not None:
            same_as_reference(found, sound[name], root / "damaged")

    one()
    outside = {path.name: path.read_bytes() for path in (root / hostile.OUTSIDE).iterdir()}
    assert outside == sound[name].files
    print(
        f"{name}: {became.total()} cases:", *(f"{what} {count}" for what, count in sorted(became.items())), sep="\n  "
    )
