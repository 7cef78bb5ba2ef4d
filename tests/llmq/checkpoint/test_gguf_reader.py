"""Files of other tools: blocks that llmq knows stay packed, all others become floats."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from packed import logits, put_dequantized
from transformers import AutoModelForCausalLM

import llmq
from llmq.checkpoint.reader import Checkpoint, is_packed
from llmq.core.errors import CheckpointError, LlmqError
from llmq.runtime.packed_linear import PackedLinear

IDS = torch.arange(70)[None] % 64
SHAPES = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
SHAPES |= {"ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96)}


def write(path, kind, odd=None, more=None):
    """A Llama of one block, rounded as llama.cpp rounds. `odd`: a type for ffn_down alone; `more`: further metadata."""
    writer, drawn = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    for name, value in {"context": 256, "embedding": 64, "feed_forward": 96}.items():
        getattr(writer, f"add_{name}_length")(value)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    for key, value in (more or {}).items():
        writer.add_string(key, value)
    for name in ("token_embd", "output"):
        writer.add_tensor(f"{name}.weight", drawn.standard_normal((64, 64)).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", drawn.uniform(0.5, 1.5, 64).astype(np.float32))
    for name, shape in SHAPES.items():
        values = (drawn.standard_normal(shape) / 4).astype(np.float32)
        its = odd if odd is not None and name == "ffn_down" else kind
        writer.add_tensor(f"blk.0.{name}.weight", gguf.quantize(values, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(path):
    """The model as transformers opens it, with all weights in float."""
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def packed_in(model):
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def check_same(model, other, rounded):
    """Compare all weights in float. Of `rounded` matrices, llmq takes the float16 numbers next to those of the file."""
    ours, found = model.state_dict(), 0
    rounded = {name.replace("ffn_", "").replace("attn_", "").replace("output", "o") + "_proj" for name in rounded}
    for name, wanted in other.state_dict().items():
        if name in ours:
            wanted = wanted.half().float() if name.split(".")[-2] in rounded else wanted
            assert torch.equal(ours[name], wanted), name
            found += 1
    assert found == len(other.state_dict()) - len(packed_in(model))


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0])
def test_blocks_of_llama_cpp_stay_packed(kind, tmp_path):
    path = write(tmp_path / "m.gguf", kind)
    assert is_packed(path)
    assert is_packed(tmp_path)
    model = llmq.load(path, "cpu")
    assert packed_in(model) == ALL
    torch.testing.assert_close(logits(model, IDS), logits(theirs(path), IDS), rtol=0, atol=1e-5)
    dense = theirs(path)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    after = put_dequantized(dense, path).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q5_0, Kind.BF16, Kind.F32])
def test_other_blocks_are_opened_as_floats(kind, tmp_path):
    """Those of Q4_1 have any least weight, which is no zero point."""
    path = write(tmp_path / "m.gguf", kind)
    assert not is_packed(path)
    model = llmq.load(path, "cpu")
    assert not packed_in(model)
    check_same(model, theirs(path), SHAPES if kind in (Kind.Q4_1, Kind.Q5_0) else ())
    with pytest.raises(LlmqError, match="holds no layer packed as gguf"):
        Checkpoint(path)


def test_a_layer_of_another_type_is_in_float_beside_packed_ones(tmp_path):
    path = write(tmp_path / "m.gguf", Kind.Q4_0, odd=Kind.Q4_1)
    model = llmq.load(path, "cpu")
    assert packed_in(model) == ALL - {"down_proj"}
    check_same(model, theirs(path), ["ffn_down"])


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_0])
def test_a_file_that_says_it_is_of_llmq_is_not_believed_blindly(kind, tmp_path):
    more = {"general.quantized_by": "llmq 0.1.0"}
    path = write(tmp_path / "m.gguf", kind, more=more)
    if kind == Kind.Q4_1:
        with pytest.raises(CheckpointError, match=r"a least weight of a Q4_1 block is no multiple of its scale"):
            llmq.load(path, "cpu")
    else:
        assert packed_in(llmq.load(path, "cpu")) == ALL


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_have_the_dtype_that_they_had(dtype, tmp_path):
    path = write(tmp_path / "m.gguf", Kind.Q4_0, more={"llmq.scale_dtype": dtype})
    checkpoint = Checkpoint(path)
    assert checkpoint.weight(checkpoint.linears[0]).scale.dtype == getattr(torch, dtype)


def test_an_unknown_dtype_of_scales_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", Kind.Q4_0, more={"llmq.scale_dtype": "float8"})
    with pytest.raises(CheckpointError, match=r"llmq\.scale_dtype is 'float8', which is no dtype of scales"):
        llmq.load(path, "cpu")


def test_tensors_are_described_without_their_numbers(tmp_path):
    files = Checkpoint(write(tmp_path / "m.gguf", Kind.Q4_0)).files
    name = "model.layers.0.mlp.down_proj.blocks"
    assert (files.dtype(name), tuple(files.shape(name)), files.is_float(name)) == (torch.uint8, (64, 54), False)
    assert files.nbytes(name) == 64 * 96 // 32 * 18
    assert files.dtype("model.norm.weight") == torch.float32
    assert files.is_float("model.norm.weight")
    assert files.nbytes("model.embed_tokens.weight") == 64 * 64 * 4


def test_a_tensor_that_the_model_has_no_place_for_is_refused(tmp_path):
    """llama.cpp would add this bias."""
    path = write(tmp_path / "m.gguf", Kind.Q4_0)
    content = path.read_bytes()
    old, new = b"blk.0.ffn_norm.weight", b"blk.0.attn_q.bias.eig"
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))
    with pytest.raises(CheckpointError, match=r"LlamaForCausalLM has no place for blk\.0\.attn_q\.bias"):
        llmq.load(path, "cpu")


def test_numbers_beyond_float16_are_refused(tmp_path):
    path = write(tmp_path / "m.gguf", Kind.Q4_0, odd=Kind.Q5_0)
    reader = gguf.GGUFReader(path, "r+")
    (stored,) = [tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight"]
    stored.data[0, :2] = np.array([60000], np.float16).view(np.uint8)
    reader.data.flush()
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_down\.weight holds numbers that are too large for float16"):
        llmq.load(path, "cpu")
