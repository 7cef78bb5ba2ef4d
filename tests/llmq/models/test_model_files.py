"""Tensors under the names of a model: as transformers loads them, and written back as the files had them."""

import json

import pytest
import torch
from architectures.tiny_models import save_tiny
from safetensors.torch import load_file, save_file

from llmq.core.errors import CheckpointError
from llmq.models.experts import layouts
from llmq.models.model_class import model_class
from llmq.models.model_source import ModelSource

CPU = torch.device("cpu")
# Names and layouts on disk that differ from those in memory: prefixes, one name, experts one by one, all experts in one
# tensor in several layouts, convolutions that are stored in three parts, transposed weights.
RENAMED = [
    "gemma3",
    "mistral3",
    "gpt_neox",
    "mixtral",
    "qwen3_moe@mixed",
    "granitemoe",
    "gpt_oss",
    "dbrx",
    "nemotron_h",
    "olmo_hybrid",
    "gpt2",
]


@pytest.fixture(scope="module", params=RENAMED)
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, directory)
    return directory


def by_expert(source, model):
    """The tensors of a model of transformers, by the names that they have in llmq's, in which experts are linears."""
    state = model.state_dict()
    for module, layout in layouts(source.skeleton).items():
        wholes = {name: state.pop(f"{module}.{name}") for name in layout.wholes}
        for expert in range(layout.experts):
            for inner, place in layout.places.items():
                state[f"{module}.{expert}.{inner}"] = place.of(wholes[place.parameter], expert, layout.experts)
    return state


def test_the_weights_are_those_that_transformers_loads(saved):
    source = ModelSource(str(saved))
    theirs = model_class(source.config).from_pretrained(saved, dtype=torch.float32).eval()
    ours = source.load_all(CPU, torch.float32)
    turned = {name for name in ours.state_dict() if source.files.turned(name, torch.empty(1, 2)).shape == (2, 1)}
    expected = by_expert(source, theirs)
    for name, tensor in expected.items():
        assert torch.equal(ours.state_dict()[name], tensor.T if name in turned else tensor), name
    assert ours.state_dict().keys() == expected.keys()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_what_stays_in_float_is_written_as_it_was(saved):
    source, files = ModelSource(str(saved)), load_file(saved / "model.safetensors")
    written = source.as_stored(source.tensor_names)
    assert written.keys() == files.keys()
    assert all(torch.equal(written[name], files[name]) for name in files)


def test_shapes_and_sizes_are_known_from_the_headers(saved, monkeypatch):
    source = ModelSource(str(saved))
    state = source.load_all(CPU, torch.float32).state_dict()
    monkeypatch.setattr(type(source.files.stored), "read", lambda *_: pytest.fail("a tensor was read"))
    for name in source.tensor_names:
        assert source.files.shape(name) == tuple(state[name].shape)
        assert source.files.nbytes(name) == state[name].nbytes
        assert source.files.dtype(name) == torch.float32


def test_a_directory_with_fused_experts_gives_the_same_model(tmp_path):
    """Some tools save experts as they are in memory."""
    model = save_tiny("qwen3_moe", tmp_path)
    fused = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    one_by_one = ModelSource(str(tmp_path)).load_all(CPU, torch.float32).state_dict()
    save_file(fused, tmp_path / "model.safetensors", {"format": "pt"})
    source = ModelSource(str(tmp_path))
    assert all(
        torch.equal(one_by_one[name], tensor)
        for name, tensor in source.load_all(CPU, torch.float32).state_dict().items()
    )
    assert source.as_stored(source.tensor_names).keys() == fused.keys()


def test_a_new_value_is_written_under_the_name_in_the_files(tmp_path):
    save_tiny("gemma3", tmp_path)
    source = ModelSource(str(tmp_path))
    norm = "model.language_model.layers.0.input_layernorm.weight"
    written = source.as_stored([norm], {norm: torch.full((64,), 7.0, dtype=torch.float64)})
    assert written.keys() == {"language_model.model.layers.0.input_layernorm.weight"}
    assert torch.equal(*written.values(), torch.full((64,), 7.0))


_UP, _EXPERT_2 = "model.layers.0.mlp.experts.2.up_proj.weight", "model.layers.0.mlp.experts.2."


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("qwen3_moe", lambda tensors: {_UP: None}),
        ("qwen3_moe", lambda tensors: {_UP: torch.zeros(3, 64)}),
        ("qwen3_moe", lambda tensors: {name: None for name in tensors if name.startswith(_EXPERT_2)}),
        (
            "qwen3_moe",
            lambda tensors: {n.replace(".2.", ".9."): t.clone() for n, t in tensors.items() if _EXPERT_2 in n},
        ),
        ("gpt_oss", lambda tensors: {"model.layers.0.mlp.experts.down_proj": torch.zeros(3, 128, 64)}),
        ("gpt_oss", lambda tensors: {"model.layers.0.mlp.experts.down_proj": torch.zeros(5, 128, 64)}),
        ("gpt_oss", lambda tensors: {"model.layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(4)}),
        ("dbrx", lambda tensors: {"transformer.blocks.0.ffn.experts.mlp.w1": torch.zeros(255, 64)}),
    ],
    ids=["no up", "small up", "no expert", "another expert", "few", "many", "flat", "not whole"],
)
def test_an_experts_tensor_that_is_missing_or_of_another_shape_is_named(kind, damage, tmp_path):
    save_tiny(kind, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damaged = {name: tensor for name, tensor in (tensors | damage(tensors)).items() if tensor is not None}
    save_file(damaged, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"(layers|blocks)\.0\.(mlp|ffn)\.experts") as caught:
        ModelSource(str(tmp_path)).load_all(CPU, torch.float32)
    assert len(str(caught.value).splitlines()) == 1


def test_two_tensors_for_one_place_are_refused(tmp_path):
    save_tiny("gpt_neox", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "embed_out.weight" in tensors
    tensors["lm_head.weight"] = tensors["embed_out.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"embed_out\.weight and lm_head\.weight are both stored for lm_head\.weight"
    ):
        ModelSource(str(tmp_path))


def test_experts_that_are_stored_one_by_one_and_together_are_refused(tmp_path):
    save_tiny("qwen3_moe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 128, 64)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"are both stored for model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        ModelSource(str(tmp_path))


def without_prefix(directory, more):
    """Save a GPT-2 as the hub has it: names without the prefix `transformer.`, and some more tensors."""
    save_tiny("gpt2", directory)
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors | more, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


@pytest.mark.parametrize("name", ["h.0.attn.c_attn.scale", "h.2.ln_1.weight"])
def test_a_tensor_without_prefix_that_the_model_ought_to_use_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match=rf"holds transformer\.{name}, which the model"):
        ModelSource(without_prefix(tmp_path, {name: torch.ones(64)}))


def test_masks_without_prefix_are_not_copied(tmp_path):
    masks = {"h.0.attn.bias": torch.ones(1, 1, 256, 256).tril()}
    assert ModelSource(without_prefix(tmp_path, masks)).carried_names == []


def test_the_class_named_in_the_config_is_built(tmp_path):
    """Qwen3.5's config also describes its text model alone."""
    save_tiny("qwen3_5@image", tmp_path)
    assert any(name.startswith("model.visual.") for name in ModelSource(str(tmp_path)).tensor_names)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3_5ForCausalLM"]}))
    source = ModelSource(str(tmp_path))
    assert type(source.skeleton).__name__ == "Qwen3_5ForCausalLM"
    assert any(name.startswith("model.visual.") for name in source.carried_names)


def test_files_may_hold_experts_that_return_their_input_or_not(tmp_path):
    """transformers has room for the gates of LongCat's; it never reads them."""
    model = save_tiny("longcat_flash", tmp_path)
    expected = by_expert(ModelSource(str(tmp_path)), model)
    whole = load_file(tmp_path / "model.safetensors")
    routed = {name: tensor for name, tensor in whole.items() if ".experts.4." not in name and ".experts.5." not in name}
    assert len(routed) < len(whole)
    for tensors in (whole, routed):
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        found = ModelSource(str(tmp_path)).load_all(CPU, torch.float32).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
