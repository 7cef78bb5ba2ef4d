"""Parts become shards, and a process that is killed meanwhile loses none of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from written import KILOBYTE, complete_source, names_in, numbers, write

from llmq.checkpoint import shard_join
from llmq.checkpoint.model_files import companions_of
from llmq.checkpoint.shard_join import grouped, join, join_shards
from llmq.checkpoint.writer import Writer
from llmq.core.errors import CheckpointError
from llmq.models.safetensors_files import INDEX, SINGLE


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return complete_source(tmp_path_factory.mktemp("source"))


TYPES = {"a": torch.float16, "b": torch.float32, "c": torch.float16}


def parts_of(directory, count):
    """Write parts of one kilobyte each."""
    directory.mkdir()
    parts = [directory / f"part-{i}.safetensors" for i in range(count)]
    for i, part in enumerate(parts):
        save_file({f"layer.{i}": numbers(KILOBYTE, i)}, part)
    return parts


def test_parts_are_joined_to_shards_that_are_as_large_as_allowed(tmp_path, source):
    with Writer(tmp_path, shard_bytes=2048) as writer:
        for i in range(5):
            writer.put({f"layer.{i}": numbers(KILOBYTE, i)})
            writer.flush()
        writer.finish(companions_of(source), torch.float16)
    shards = [sorted(load_file(path)) for path in sorted(tmp_path.glob("model-*"))]
    assert shards == [["layer.0", "layer.1"], ["layer.2", "layer.3"], ["layer.4"]]


def test_a_shard_of_several_parts_is_what_safetensors_would_have_written(tmp_path, source):
    tensors = {
        "b": numbers(3),
        "a": torch.arange(5, dtype=torch.int8),
        "c": numbers(2).half(),
        "d": numbers(1).double(),
    }
    with Writer(tmp_path / "out") as writer:
        for name, tensor in tensors.items():
            writer.put({name: tensor})
            writer.flush()
        writer.finish(companions_of(source), torch.float16)
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_tensors_lie_in_the_order_of_width_and_then_of_name_whatever_their_dtype(tmp_path):
    first = {"c.scale": numbers(1), "d": torch.zeros(0), "e": torch.tensor(True), "f": torch.tensor([3, 4])}
    second = {"b.codes": torch.tensor([[1, 2]], dtype=torch.int32), "a": torch.ones(1, dtype=torch.bfloat16)}
    for name, tensors in (("first", first), ("second", second)):
        save_file(tensors, tmp_path / name)
    join([tmp_path / "first", tmp_path / "second"], tmp_path / "joined")
    data = (tmp_path / "joined").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert list(header) == ["__metadata__", "f", "b.codes", "c.scale", "d", "a", "e"]
    joined = load_file(tmp_path / "joined")
    assert all(torch.equal(joined[name], tensor) for name, tensor in (first | second).items())


def test_the_index_lists_every_tensor_in_the_shard_that_holds_it(tmp_path, source):
    tensors = {f"layer.{i}": numbers(KILOBYTE, i) for i in range(5)}
    write(tmp_path, source, tensors, shard_bytes=2048)
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(tmp_path.glob("model-*")) == [tmp_path / shard for shard in shards]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 1024
    assert index["weight_map"].keys() == tensors.keys()
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / shard)[name], tensors[name])
    assert sum(len(load_file(tmp_path / shard)) for shard in shards) == 5


@pytest.mark.parametrize("joined", [0, 1, 2])
def test_a_join_that_stops_between_two_shards_is_continued_to_the_same_bytes(joined, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    join_shards(parts_of(tmp_path / "others", 5), tmp_path / "whole.json", tmp_path / "whole", 2048)
    parts, plan, directory = parts_of(tmp_path / "parts", 5), tmp_path / "plan.json", tmp_path / "out"
    directory.mkdir()
    done = []

    def join_some(members, path, stack_of):
        if len(done) == joined:
            raise KeyboardInterrupt
        done.append(path.name)
        join(members, path, stack_of)

    with monkeypatch.context() as patch:
        patch.setattr(shard_join, "join", join_some)
        with pytest.raises(KeyboardInterrupt):
            join_shards(parts, plan, directory, 2048)
    assert names_in(directory) == done
    assert names_in(tmp_path / "parts") == [part.name for part in parts[2 * joined :]]
    join_shards(parts, plan, directory, 2048)
    assert names_in(tmp_path / "parts") == []
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_parts_are_grouped_in_their_order_and_one_that_is_too_large_is_alone():
    assert grouped([3, 4, 3, 11, 1, 9, 1], 10) == [[0, 1, 2], [3], [4, 5], [6]]
    assert grouped([], 10) == []


def test_bound_parts_are_with_the_ones_before_them_whatever_their_size():
    bound = [False, False, True, True, False, True, False]
    assert grouped([3, 8, 3, 11, 1, 9, 1], 10, bound) == [[0], [1, 2, 3], [4, 5], [6]]


def stack_of(name):
    stack, _, number = name.partition("#")
    return (stack, int(number)) if number else None


def test_the_parts_of_a_stack_become_one_tensor_in_one_shard(tmp_path):
    parts = [tmp_path / f"part-{i}.safetensors" for i in range(4)]
    halves = {f"{name}#{i}": numbers(6, i).view(2, 3).to(dtype) for name, dtype in TYPES.items() for i in range(12)}
    names = sorted(halves, key=lambda name: int(name.partition("#")[2]))
    for part, own in zip(parts[1:], (names[:9], names[9:20], names[20:]), strict=True):
        save_file({name: halves[name] for name in own}, part)
    save_file({"alone": numbers(100)}, parts[0])
    (tmp_path / "shards").mkdir()
    join_shards(parts, tmp_path / "plan.json", tmp_path / "shards", 300, stack_of)
    first, second = (load_file(path) for path in sorted((tmp_path / "shards").glob("*.safetensors")))
    assert list(first) == ["alone"]
    assert second.keys() == TYPES.keys()
    for name in TYPES:
        assert torch.equal(second[name], torch.stack([halves[f"{name}#{i}"] for i in range(12)]))
    assert json.loads((tmp_path / "shards" / INDEX).read_text())["weight_map"].keys() == {"alone", *TYPES}


@pytest.mark.parametrize(
    "odd", [{}, {"a#1": numbers(3)}, {"a#1": numbers(2).half()}], ids=["missing", "shape", "dtype"]
)
def test_parts_that_make_no_stack_are_refused(tmp_path, odd):
    save_file({"a#0": numbers(2), "a#2": numbers(2), **odd}, tmp_path / "part.safetensors")
    with pytest.raises(CheckpointError, match="a: its parts are not all there, or differ"):
        join([tmp_path / "part.safetensors"], tmp_path / "joined", stack_of)


def test_a_part_that_was_cut_off_is_an_error(tmp_path):
    (part,) = parts_of(tmp_path / "parts", 1)
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(OSError, match=rf"{part.name} is damaged"):
        join([part], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
