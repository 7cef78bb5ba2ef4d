"""Free memory is the machine's, or what the narrowest limit of a container leaves."""

import psutil
import pytest
import torch

from llmq.core import memory
from llmq.core.memory import PeakMemory, free_memory, left_by_cgroups, resident_now, resident_peak

GB = 10**9


def group(root, path, **files):
    """A cgroup's directory below a made-up root of the file system."""
    directory = root / "sys/fs/cgroup" / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / ("memory." + name)).write_text(f"{content}\n")


def process(root, *lines):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_every_limit_from_the_process_group_to_the_top_counts(tmp_path):
    process(tmp_path, "0::/pods/one")
    group(tmp_path, "pods/one", max="max", current=GB)
    group(tmp_path, "pods", max=8 * GB, current=3 * GB, stat=f"anon 5\ninactive_file {GB}\nfile 7")
    group(tmp_path, "", max=20 * GB, current=4 * GB)
    assert list(left_by_cgroups(tmp_path)) == [6 * GB, 16 * GB]


def test_a_path_that_is_not_visible_in_the_container_leaves_the_limits_at_the_top(tmp_path):
    process(tmp_path, "0::/machine/container")
    group(tmp_path, "", max=4 * GB, current=5 * GB)
    assert list(left_by_cgroups(tmp_path)) == [0]


def test_version_1_has_other_names(tmp_path):
    process(tmp_path, "12:cpu,cpuacct:/a", "9:memory:/a", "0::/a")
    group(tmp_path, "memory/a", limit_in_bytes=2 * GB, usage_in_bytes=GB, stat="total_inactive_file 1000")
    group(tmp_path, "memory", limit_in_bytes=9223372036854771712, usage_in_bytes=GB)
    assert list(left_by_cgroups(tmp_path)) == [GB + 1000, 9223372036854771712 - GB]


@pytest.mark.parametrize("lines", [(), ("0::/nowhere",)])
def test_without_limits_there_are_none(lines, tmp_path):
    process(tmp_path, *lines)
    assert list(left_by_cgroups(tmp_path)) == []
    assert list(left_by_cgroups(tmp_path / "no-linux")) == []


@pytest.mark.parametrize(("limits", "expected"), [([], 5 * GB), ([9 * GB], 5 * GB), ([7 * GB, 3 * GB], 3 * GB)])
def test_free_is_the_least_of_the_machine_and_all_limits(limits, expected, monkeypatch):
    available = psutil.virtual_memory()._replace(available=5 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(memory, "left_by_cgroups", lambda _: iter(limits))
    assert free_memory(torch.device("cpu")) == expected


def test_the_peak_is_never_below_what_the_program_has_now():
    peak = PeakMemory()
    held = torch.ones(10_000_000)
    now = resident_now()
    assert resident_peak() >= now - (1 << 20)  # the system counts some pages late
    assert now > held.nbytes
    assert peak.take() > held.nbytes
    assert peak.largest > held.nbytes
