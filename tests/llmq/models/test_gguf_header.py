"""The header of a .gguf file: read as the package gguf reads it, and refused wherever it is damaged."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from llmq.core.errors import CheckpointError
from llmq.models.gguf_header import StoredTensor, read_header

NUMBERS = {
    GGUFValueType.UINT8: 200,
    GGUFValueType.INT8: -100,
    GGUFValueType.UINT16: 60_000,
    GGUFValueType.INT16: -30_000,
    GGUFValueType.UINT32: 4_000_000_000,
    GGUFValueType.INT32: -2_000_000_000,
    GGUFValueType.FLOAT32: 0.5,
    GGUFValueType.BOOL: True,
    GGUFValueType.UINT64: 1 << 63,
    GGUFValueType.INT64: -(1 << 62),
    GGUFValueType.FLOAT64: 1e300,
}
TENSORS = {
    "token_embd.weight": np.arange(96, dtype=np.float16).reshape(3, 32),
    "output_norm.weight": np.ones(5, np.float32),  # the next one begins after a gap
    "blk.0.ffn_up_exps.weight": np.arange(384, dtype=np.float32).reshape(2, 3, 64),
}


def write(path, alignment=None, kinds=tuple(NUMBERS)):
    """A file with metadata of every type, four tensors, and one of them in blocks."""
    writer = GGUFWriter(str(path), "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_string("some.text", "Grüße")
    for kind in kinds:
        value = NUMBERS[kind]
        writer.add_key_value(f"some.{kind.name}", value, kind)
        writer.add_key_value(f"some.three of {kind.name}", [value] * 3, GGUFValueType.ARRAY, sub_type=kind)
    writer.add_array("some.texts", ["", "a", "bc" * 40])
    for name, values in TENSORS.items():
        writer.add_tensor(name, values)
    blocks = np.arange(4 * 36, dtype=np.uint8).reshape(4, 36)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_it_finds_what_the_package_gguf_finds(alignment, tmp_path):
    path = write(tmp_path / "m.gguf", alignment)
    header, reader = read_header(path), GGUFReader(path)
    found = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(found)
    for key, field in found.items():
        value = field.contents()
        assert header.metadata[key] == (len(value) if field.types[0] == GGUFValueType.ARRAY else value), key
    assert {value for value in NUMBERS.values() if value not in header.metadata.values()} == set()
    theirs = {
        tensor.name: StoredTensor(int(tensor.tensor_type), tuple(tensor.shape.tolist()), tensor.data_offset)
        for tensor in reader.tensors
    }
    assert header.tensors == theirs
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        name: values.shape[::-1] for name, values in TENSORS.items()
    } | {"blk.0.attn_q.weight": (64, 4)}


def test_data_lie_where_it_says(tmp_path):
    path = write(tmp_path / "m.gguf", 64)
    content, header = path.read_bytes(), read_header(path)
    for name, values in TENSORS.items():
        start = header.tensors[name].start
        assert start % 64 == 0
        assert content[start : start + values.nbytes] == values.tobytes()


def test_wherever_a_file_ends_too_early_its_header_is_refused(tmp_path):
    """If only data are missing, the header is the same. Whoever reads them will notice."""
    path = write(tmp_path / "m.gguf", kinds=[GGUFValueType.INT16])
    content, header = path.read_bytes(), read_header(path)
    ends = min(tensor.start for tensor in header.tensors.values())
    for length in range(ends - gguf.GGUF_DEFAULT_ALIGNMENT):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"is no sound \.gguf file") as caught:
            read_header(path)
        assert len(str(caught.value).splitlines()) == 1
    for length in range(ends + TENSORS["blk.0.ffn_up_exps.weight"].nbytes, len(content), 7):
        path.write_bytes(content[:length])
        assert read_header(path) == header
    path.write_bytes(content + b"more")
    assert read_header(path) == header


def text(value):
    return struct.pack("<Q", len(value)) + value


def a_file(keys=b"", tensors=b"", counts=(0, 0), version=3, data=64):
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + tensors + bytes(data)


def a_key(kind, value, name=b"k"):
    return text(name) + struct.pack("<I", kind) + value


def a_tensor(shape, name=b"t", dimensions=None, offset=0):
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, 0, offset)


HUGE = 1 << 62
REFUSED = {
    "nothing": (b"", "empty"),
    "another file": (b"PK\3\4" + bytes(100), "does not begin with GGUF"),
    "version 1": (a_file(version=1), "version 1 of the format; llmq reads 2 and 3"),
    "the other byte order": (a_file(version=3 << 24), "version 50331648 of the format"),
    "tensors without end": (a_file(counts=(HUGE, 0)), "it promises .* tensors"),
    "keys without end": (a_file(counts=(0, HUGE)), "it promises .* keys"),
    "more tensors than there are": (a_file(tensors=a_tensor((8,)), counts=(2, 0)), "a tensor of 0 dimensions"),
    "a key without end": (a_file(struct.pack("<Q", HUGE), counts=(0, 1)), "it ends too early"),
    "a key that is no text": (a_file(a_key(4, bytes(4), b"\xff\xfe"), counts=(0, 1)), "codec can't decode"),
    "a text without end": (a_file(a_key(8, struct.pack("<Q", HUGE)), counts=(0, 1)), "it ends too early"),
    "a value of no type": (a_file(a_key(13, bytes(8)), counts=(0, 1)), "a value of type 13"),
    "an array without end": (a_file(a_key(9, struct.pack("<IQ", 4, HUGE)), counts=(0, 1)), "it ends too early"),
    "texts without end": (a_file(a_key(9, struct.pack("<IQ", 8, HUGE)), counts=(0, 1)), "an array of .* texts"),
    "texts that end": (a_file(a_key(9, struct.pack("<IQ", 8, 60)), counts=(0, 1)), "it ends too early"),
    "an array of arrays": (a_file(a_key(9, struct.pack("<IQ", 9, 1)), counts=(0, 1)), "an array of values of type 9"),
    "a key twice": (a_file(a_key(0, b"\1") * 2, counts=(0, 2)), "'k' is there twice"),
    "a tensor twice": (a_file(tensors=a_tensor((8,)) * 2, counts=(2, 0)), "tensor 't' is there twice"),
    "no dimensions": (a_file(tensors=a_tensor(()), counts=(1, 0)), "a tensor of 0 dimensions"),
    "five dimensions": (a_file(tensors=a_tensor((1,) * 5), counts=(1, 0)), "a tensor of 5 dimensions"),
    "dimensions without end": (a_file(tensors=a_tensor((8,), dimensions=1 << 31), counts=(1, 0)), "a tensor of 2147"),
    "nothing in a tensor": (a_file(tensors=a_tensor((8, 0)), counts=(1, 0)), "do not fit into it"),
    "a huge tensor": (a_file(tensors=a_tensor((1 << 20, 1 << 20)), counts=(1, 0)), "do not fit into it"),
    "a product of 2 to the 64": (a_file(tensors=a_tensor((1 << 32, 1 << 32)), counts=(1, 0)), "do not fit into it"),
    "a tensor behind the end": (a_file(tensors=a_tensor((8,), offset=HUGE), counts=(1, 0)), "do not fit into it"),
}
for value in (0, HUGE):
    key = a_key(10, struct.pack("<Q", value), b"general.alignment")
    REFUSED[f"an alignment of {value}"] = (a_file(key, counts=(0, 1)), f"an alignment of {value}")
key = a_key(8, text(b"32"), b"general.alignment")
REFUSED["an alignment that is a text"] = (a_file(key, counts=(0, 1)), "an alignment of 32")


@pytest.mark.parametrize("case", REFUSED)
def test_damage_is_refused_in_one_line(case, tmp_path):
    content, reason = REFUSED[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"m\.gguf is no sound \.gguf file \(.*{reason}.*; fetch it again"
    ) as caught:
        read_header(tmp_path / "m.gguf")
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match=r"is no sound \.gguf file"):
            read_header(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 5),
        ("context_length", (1 << 27) + 1),
        ("embedding_length", 65),
        ("feed_forward_length", 1 << 31),
        ("attention.head_count", 65),
        ("attention.head_count_kv", 65),
        ("attention.key_length", 65),
        ("rope.dimension_count", 65),
        ("expert_count", 65),
        ("vocab_size", 65),
        ("attention.head_count", -1),
        ("attention.head_count", float("nan")),
    ],
)
def test_counts_that_the_tensors_do_not_allow_are_refused(key, value, tmp_path):
    """The longest side of the tensors is 64, and there are four of them."""
    sound = {"block_count": 4, "context_length": 1 << 27, "attention.head_count": 64, "expert_count": 0}
    for counts, refused in ((sound, False), (sound | {key: value}, True)):
        writer = GGUFWriter(str(tmp_path / f"{refused}.gguf"), "llama")
        for each, count in counts.items():
            kind = GGUFValueType.INT32 if isinstance(count, int) and count < 0 else GGUFValueType.get_type(count)
            writer.add_key_value(f"llama.{each}", count, GGUFValueType.UINT32 if count == 1 << 31 else kind)
        for name, values in (TENSORS | {"other": np.ones(3, np.float32)}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert len(read_header(tmp_path / "False.gguf").tensors) == 4
    with pytest.raises(CheckpointError, match=rf"llama\.{key} is {value}, more than its tensors allow"):
        read_header(tmp_path / "True.gguf")
