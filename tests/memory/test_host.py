"""What Linux says in `/proc` and of control groups, and what it does not say."""

from pathlib import Path

import pytest

from trio_router.memory.host import FRESH_SECONDS, HostMemory, available_bytes, has_unseen_gpu

KIB = 1024
GIB = 1024**3
MEMINFO = "MemTotal:       33554432 kB\nMemFree:         1048576 kB\nMemAvailable:   16777216 kB\nBuffers: 1 kB\n"
"""16 GiB available."""
V1_UNBOUNDED = "9223372036854771712"
SLICE = "0::/system.slice/trio-router.service\n"


def host(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def v2(group: str, limit: str, used: int, droppable: int | None = None) -> dict[str, str | bytes]:
    folder = f"sys/fs/cgroup{group}"
    files: dict[str, str | bytes] = {f"{folder}/memory.max": f"{limit}\n", f"{folder}/memory.current": f"{used}\n"}
    if droppable is not None:
        files[f"{folder}/memory.stat"] = f"anon 5\nactive_file 9\ninactive_file {droppable}\nslab 1\n"
    return files


def v1(group: str, limit: str, used: int, droppable: int) -> dict[str, str | bytes]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 7\ntotal_inactive_file {droppable}\n",
    }


def test_where_nobody_says(tmp_path):
    assert available_bytes(tmp_path) is None
    assert available_bytes(host(tmp_path, {"proc/meminfo": "MemTotal: 5 kB\n"})) is None


def test_without_control_groups(tmp_path):
    assert available_bytes(host(tmp_path, {})) == 16 * GIB


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (v2("/system.slice/trio-router.service", str(8 * GIB), 3 * GIB), 5 * GIB),
        (v2("/system.slice/trio-router.service", str(8 * GIB), 3 * GIB, droppable=GIB), 6 * GIB),
        (v2("/system.slice/trio-router.service", "max", 3 * GIB), 16 * GIB),
        (v2("/system.slice/trio-router.service", str(64 * GIB), 3 * GIB), 16 * GIB),
        (v2("/system.slice/trio-router.service", str(2 * GIB), 3 * GIB), 0),
        (v2("/system.slice/trio-router.service", "0", 0), 0),
        (v2("/system.slice", str(4 * GIB), GIB), 3 * GIB),
        (v2("", str(4 * GIB), 3 * GIB), GIB),
        (
            v2("/system.slice/trio-router.service", str(8 * GIB), GIB) | v2("/system.slice", str(9 * GIB), 7 * GIB),
            2 * GIB,
        ),
        (v2("/system.slice/other.service", str(GIB), 0), 16 * GIB),
    ],
    ids=["own", "with pages to drop", "max", "more than there is", "overdrawn", "nothing", "a parent's", "the top's", "nested", "another's"],
)  # fmt: skip
def test_version_2(tmp_path, limits, left):
    assert available_bytes(host(tmp_path, {"proc/self/cgroup": SLICE, **limits})) == left


@pytest.mark.parametrize("group", ["/docker/1a2b", "/../../elsewhere", "/"])
def test_a_container_sees_its_own_group_as_the_top_one(tmp_path, group):
    files = {"proc/self/cgroup": f"0::{group}\n", **v2("", str(2 * GIB), GIB)}
    assert available_bytes(host(tmp_path, files)) == GIB


def test_a_group_elsewhere_is_not_looked_for_outside(tmp_path):
    files = {
        "proc/self/cgroup": "0::/../secret\n",
        "sys/fs/secret/memory.max": "1",
        "sys/fs/secret/memory.current": "0",
    }
    assert available_bytes(host(tmp_path, files)) == 16 * GIB


LINES_V1 = "12:pids:/a\n11:cpu,cpuacct:/a\n9:hugetlb,memory:/a/b\n1:name=systemd:/a/b\n"


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (v1("/a/b", str(6 * GIB), 5 * GIB, GIB), 2 * GIB),
        (v1("/a/b", V1_UNBOUNDED, 5 * GIB, GIB), 16 * GIB),
        (v1("/a/b", str(6 * GIB), GIB, 0) | v1("/a", str(3 * GIB), 2 * GIB, 0), GIB),
        (v1("", str(6 * GIB), 2 * GIB, 0), 4 * GIB),
        (v2("/a/b", str(GIB), 0), 16 * GIB),
    ],
    ids=["own", "unbounded", "nested", "the top's", "of version 2"],
)
def test_version_1(tmp_path, limits, left):
    assert available_bytes(host(tmp_path, {"proc/self/cgroup": LINES_V1, **limits})) == left


def test_both_versions_at_once(tmp_path):
    files = {
        "proc/self/cgroup": LINES_V1 + "0::/c\n",
        **v1("/a/b", str(6 * GIB), GIB, 0),
        **v2("/c", str(5 * GIB), GIB),
    }
    assert available_bytes(host(tmp_path, files)) == 4 * GIB


@pytest.mark.parametrize(
    "groups",
    [
        "", "\n\n", "0", "0:", "what is this", ":::::", "0::" + "/x" * 5000, "0::/a\0b", b"0::/\xff\xfe\n", b"\x80\x81", "0::", "0::relative",
        "9:memory", "9:memory,:/",
    ],
    ids=repr,
)  # fmt: skip
def test_odd_lines_of_groups(tmp_path, groups):
    assert available_bytes(host(tmp_path, {"proc/self/cgroup": groups})) == 16 * GIB


@pytest.mark.parametrize(
    "odd", ["", "max", "-1", "1e9", "0x10", "²", "5 6", "9" * 5000, b"\xff\xfe"], ids=lambda odd: repr(odd)[:20]
)
@pytest.mark.parametrize("name", ["memory.max", "memory.current"])
def test_odd_limits_bound_nothing(tmp_path, name, odd):
    files = {"proc/self/cgroup": SLICE, **v2("", str(GIB), 0), f"sys/fs/cgroup/{name}": odd}
    assert available_bytes(host(tmp_path, files)) == 16 * GIB


@pytest.mark.parametrize(
    "odd",
    ["", "inactive_file", "inactive_file x", "inactive_file -5", "inactive_files 5", b"\xff inactive_file 5"],
    ids=repr,
)
def test_odd_statistics_are_no_pages_to_drop(tmp_path, odd):
    files = {"proc/self/cgroup": SLICE, **v2("", str(GIB), 0), "sys/fs/cgroup/memory.stat": odd}
    assert available_bytes(host(tmp_path, files)) == GIB


@pytest.mark.parametrize(
    "odd",
    ["MemAvailable:", "MemAvailable: x kB", "MemAvailable:\n", b"MemAvailable: \xff kB", "MemAvailable: -5 kB"],
    ids=repr,
)
def test_odd_memory_is_unknown(tmp_path, odd):
    assert available_bytes(host(tmp_path, {"proc/meminfo": odd})) is None


def test_folders_in_the_place_of_files(tmp_path):
    host(tmp_path, {"proc/self/cgroup": SLICE})
    (tmp_path / "sys/fs/cgroup/memory.max").mkdir(parents=True)
    assert available_bytes(tmp_path) == 16 * GIB


def test_this_machine():
    found = available_bytes()
    assert found is None or 0 <= found < 1 << 50


def test_it_is_looked_at_once_a_second():
    looks = iter([5, None, 7])
    memory = HostMemory(read=lambda: next(looks))
    assert [memory.available(now) for now in (0.0, FRESH_SECONDS * 0.9)] == [5, 5]
    assert memory.available(FRESH_SECONDS) is None
    assert memory.available(FRESH_SECONDS * 1.5) is None
    assert memory.available(FRESH_SECONDS * 2) == 7


def test_gpus_that_nvml_does_not_know(tmp_path):
    assert not has_unseen_gpu(tmp_path)
    (tmp_path / "dev/dri").mkdir(parents=True)
    (tmp_path / "dev/dri/card0").touch()
    assert not has_unseen_gpu(tmp_path), "a display is no GPU to compute on"
    (tmp_path / "dev/dri/renderD128").touch()
    assert has_unseen_gpu(tmp_path)
    (tmp_path / "dev/dri/renderD128").unlink()
    (tmp_path / "dev/kfd").touch()
    assert has_unseen_gpu(tmp_path)
