"""Free memory is what the machine and the container's limits leave; the peak can be taken piece by piece."""

from types import SimpleNamespace

import pytest
import torch

from llmq.core.memory import PeakMemory, free_memory, resident_now, resident_peak

CPU = torch.device("cpu")
MACHINE = 10_000


@pytest.fixture
def free(tmp_path, monkeypatch):
    """Free memory of a machine with 10,000 bytes, given /proc/self/cgroup and the files below /sys/fs/cgroup."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=MACHINE))

    def free(membership, files):
        for name, content in {"proc/self/cgroup": membership, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))
        return free_memory(CPU, tmp_path)

    return free


def v2(directory, limit, use, cache=0):
    stat = f"anon 1\ninactive_file {cache}\nactive_file 7777\n"
    names = {"memory.max": limit, "memory.current": use, "memory.stat": stat}
    return {f"{directory}{name}": content for name, content in names.items()}


def v1(directory, limit, use, cache=0):
    stat = f"inactive_file 5555\ntotal_inactive_file {cache}\n"
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": use, "memory.stat": stat}
    return {f"memory/{directory}{name}": content for name, content in names.items()}


V1_LINES = "8:pids:/jobs\n4:memory:/jobs/mine\n1:cpu:/\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {}, MACHINE),
        ("", {}, MACHINE),
        ("0::/mine\n", v2("mine/", "max", 400), MACHINE),
        ("0::/mine\n", v2("mine/", 1000, 400), 600),
        ("0::/mine\n", v2("mine/", 1000, 400, cache=300), 900),
        ("0::/mine\n", v2("mine/", 1000, 1200), 0),
        ("0::/mine\n", v2("mine/", 1000, 200, cache=300), 1000),
        ("0::/mine\n", v2("mine/", 10**9, 400), MACHINE),
        ("0::/a/b\n", v2("a/b/", "max", 10) | v2("a/", 2000, 500) | v2("", 5000, 900), 1500),
        ("0::/a/b\n", v2("a/b/", 3000, 10) | v2("a/", 8000, 500) | v2("", 1000, 900), 100),
        ("0::/a:b\n", v2("a:b/", 1000, 400), 600),
        ("0::/elsewhere/on/the/host\n", v2("", 1000, 400), 600),
        (V1_LINES, v1("jobs/mine/", 1000, 400), 600),
        (V1_LINES, v1("jobs/mine/", 1000, 400, cache=100), 700),
        (V1_LINES, v1("jobs/mine/", 9223372036854771712, 400) | v1("jobs/", 700, 500), 200),
        (V1_LINES, v1("jobs/mine/", 9223372036854771712, 400), MACHINE),
        ("3:cpu,memory:/x\n", v1("x/", 1000, 400), 600),
        ("0::/mine\n", {"mine/memory.max": 1000}, 1000),
        ("0::/mine\n", {"mine/memory.max": "nonsense", "mine/memory.current": 5}, MACHINE),
        ("nonsense\n", v2("mine/", 1000, 400), MACHINE),
    ],
)
def test_free_memory_is_the_least_that_the_machine_and_any_limit_leave(membership, files, expected, free):
    assert free(membership, files) == expected


def test_a_limit_that_cannot_be_read_is_none(free, tmp_path):
    (tmp_path / "sys/fs/cgroup/mine/memory.max").mkdir(parents=True)
    assert free("0::/mine\n", v2("", 3000, 400)) == 2600


def test_this_machine_has_free_memory_and_this_process_takes_some():
    assert free_memory(CPU) > 0
    assert 10_000_000 < resident_now() <= resident_peak() * 1.1


def test_the_peak_is_of_the_while_since_the_last_look_and_the_largest_of_all_time():
    memory = PeakMemory()
    memory.take()
    before = memory.take()
    large = torch.ones(40_000_000)
    assert memory.take() > before + 100_000_000
    del large
    assert memory.take() < memory.largest
    assert memory.largest > before + 100_000_000
