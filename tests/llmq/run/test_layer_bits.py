"""`--layer-bits`: other bits for some layers, the same for those that engines fuse."""

import pytest
from architectures.tiny_models import save_tiny
from packed import pack

from llmq.checkpoint.reader import Checkpoint
from llmq.core.config import QuantizeConfig
from llmq.core.errors import RequestError


def bits_of(directory):
    checkpoint = Checkpoint(directory)
    return {name: (checkpoint.weight(name).bits, checkpoint.schemes[name].bits) for name in checkpoint.linears}


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_each_layer_has_the_bits_of_the_first_name_that_fits_it(llama, tmp_path, form):
    wanted = ("layers.1.mlp.*=3", "down_proj=8", "model.layers.1.*=2")
    found = bits_of(pack(llama, tmp_path / "packed", format=form, layer_bits=wanted))
    for name, bits in found.items():
        expected = 4
        if ".1." in name:
            expected = 3 if ".mlp." in name else 2
        elif "down_proj" in name:
            expected = 8
        assert bits == (expected, expected), name
    assert len(found) == 14


def test_gptq_rounds_every_layer_on_its_own_grid(llama, text_file, tmp_path):
    options = {"method": "gptq", "calibration": str(text_file), "samples": 4, "sequence_length": 32, "effort": "fast"}
    mixed = Checkpoint(pack(llama, tmp_path / "mixed", layer_bits=("down_proj=8",), **options))
    uniform = Checkpoint(pack(llama, tmp_path / "uniform", **options))
    name = "model.layers.0.mlp.down_proj"
    assert int(mixed.weight(name).q.max()) > 15 >= int(uniform.weight(name).q.max())
    first = "model.layers.0.self_attn.q_proj"  # nothing before it has changed
    assert mixed.weight(first).q.equal(uniform.weight(first).q)


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (
            ("q_proj=8",),
            "engines fuse q_proj, k_proj, v_proj of model.layers.0.self_attn; give all the same bits",
        ),
        (
            ("layers.1.mlp.up_proj=3",),
            "gate_proj, up_proj of model.layers.1.mlp; give all the same bits",
        ),
        (("down_proj=8", "no_such_layer=3"), "no linear of this model is called 'no_such_layer'"),
        (("layers.7.*=8",), "no linear of this model is called"),
        (("lm_head=8",), "no linear of this model is called"),
    ],
)
def test_bits_that_no_engine_could_run_are_refused_before_any_work(llama, tmp_path, wanted, reason):
    with pytest.raises(RequestError, match=reason):
        pack(llama, tmp_path / "packed", layer_bits=wanted)
    assert not (tmp_path / "packed").exists()


def test_all_experts_of_a_module_have_the_same_bits(tmp_path):
    save_tiny("mixtral", tmp_path / "source")
    with pytest.raises(RequestError, match=r"run all experts of model\.layers\.0\.mlp\.experts in one scheme"):
        pack(tmp_path / "source", tmp_path / "packed", layer_bits=("experts.1.*=8",))
    pack(tmp_path / "source", tmp_path / "packed", layer_bits=("experts.*=8",))
    schemes = Checkpoint(tmp_path / "packed").schemes
    assert {scheme.bits for name, scheme in schemes.items() if ".experts." in name} == {8}
    assert {scheme.bits for name, scheme in schemes.items() if ".self_attn." in name} == {4}


@pytest.mark.parametrize("wanted", ["down_proj", "down_proj=", "=4", "down_proj=7", "down_proj=16", "down_proj=x"])
def test_what_is_no_name_with_bits_is_refused(tmp_path, wanted):
    with pytest.raises(RequestError, match="NAME=BITS"):
        QuantizeConfig("demo", tmp_path, layer_bits=(wanted,))


def test_awq_files_cannot_hold_them(tmp_path):
    with pytest.raises(RequestError, match="4-bit weights only"):
        QuantizeConfig("demo", tmp_path, format="awq", layer_bits=("down_proj=8",))
    assert QuantizeConfig("demo", tmp_path, symmetric=False).stored_as == "awq"
    assert QuantizeConfig("demo", tmp_path, symmetric=False, layer_bits=("down_proj=8",)).stored_as == "gptq"
    assert QuantizeConfig("demo", tmp_path, symmetric=False, bits=3).stored_as == "gptq"
    assert QuantizeConfig("demo", tmp_path, layer_bits=("down_proj=8",)).stored_as == "compressed-tensors"
