"""The quick reader of .gguf files finds what the package's own finds."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType
from transformers.modeling_gguf_pytorch_utils import read_field

from llmq.models.gguf_arrays import QuickReader
from llmq.models.gguf_header import read_header
from llmq.models.locate import locate

ARRAYS = {
    GGUFValueType.UINT8: [0, 200],
    GGUFValueType.INT8: [-100, 5, 7],
    GGUFValueType.UINT16: [60_000],
    GGUFValueType.INT16: [-30_000, 1],
    GGUFValueType.UINT32: [4_000_000_000],
    GGUFValueType.INT32: [-2_000_000_000, 3],
    GGUFValueType.FLOAT32: [0.5, -0.0, float("inf")],
    GGUFValueType.BOOL: [True, False],
    GGUFValueType.UINT64: [1 << 63],
    GGUFValueType.INT64: [-(1 << 62), 2],
    GGUFValueType.FLOAT64: [1e300, -1.5],
    GGUFValueType.STRING: ["", "a", "Grüße", "<s>" * 40, ""],
}


def write(path):
    """A file with arrays of every type at odd places, other values between them, and three tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for kind, values in ARRAYS.items():
        writer.add_key_value(f"some.{kind.name}", values, GGUFValueType.ARRAY, sub_type=kind)
        writer.add_string(f"odd.{kind.name}", "x" * kind)
        writer.add_float32(f"after.{kind.name}", 0.25)
    writer.add_tensor("token_embd.weight", np.arange(96, dtype=np.float16).reshape(3, 32))
    writer.add_tensor("output_norm.weight", np.ones(5, np.float32))
    blocks = np.arange(4 * 36, dtype=np.uint8).reshape(4, 36)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def without_values(kind):
    """A file whose one value is an empty array, where the file ends."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", GGUFValueType.ARRAY, kind, 0)


def assert_same(path):
    read_header(path)
    ours, theirs = QuickReader(path), GGUFReader(path)
    assert list(ours.fields) == list(theirs.fields)
    for key, field in theirs.fields.items():
        found = ours.fields[key]
        assert (found.offset, found.name, found.types) == (field.offset, field.name, field.types)
        assert repr(found.contents()) == repr(field.contents()), key
        assert repr(read_field(ours, key)) == repr(read_field(theirs, key)), key  # as transformers reads them
        assert found.types[0] != GGUFValueType.ARRAY or found.contents(slice(1, 3)) == field.contents(slice(1, 3))
    assert (ours.data_offset, ours.alignment, ours.byte_order) == (theirs.data_offset, theirs.alignment, "I")
    assert len(ours.tensors) == len(theirs.tensors)
    for found, tensor in zip(ours.tensors, theirs.tensors, strict=True):
        assert (found.name, found.tensor_type, found.n_bytes) == (tensor.name, tensor.tensor_type, tensor.n_bytes)
        assert found.shape.tolist() == tensor.shape.tolist()
        assert found.data.dtype == tensor.data.dtype
        assert np.array_equal(found.data, tensor.data)


def test_arrays_of_every_type(tmp_path):
    path = write(tmp_path / "m.gguf")
    assert_same(path)
    found = QuickReader(path).fields
    assert {kind: found[f"some.{kind.name}"].contents() for kind in ARRAYS} == ARRAYS


@pytest.mark.parametrize("kind", [*ARRAYS, 13])
def test_empty_arrays(kind, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(without_values(kind))
    if kind in ARRAYS:
        assert_same(path)
    else:  # the header's check refuses it; the package does not
        assert QuickReader(path).fields["k"].contents() == GGUFReader(path).fields["k"].contents()


@pytest.mark.demo
def test_the_demo_model():
    assert_same(locate("demo"))


def test_nothing_is_copied_or_writable(tmp_path):
    """The words stay in the file: a vocabulary costs no memory twice."""
    reader = QuickReader(write(tmp_path / "m.gguf"))
    for key in ("some.STRING", "some.UINT32"):
        field = reader.fields[key]
        for part in (field.parts[index] for index in field.data):
            assert not part.flags.writeable
            assert not part.flags.owndata
