"""Linux' counters and limits, read from made-up trees; and this machine's own, for plausibility."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edgelm.memory.platform import current_platform
from edgelm.memory.platform.base import Pressure
from edgelm.memory.platform.linux import Linux

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux' own interfaces")

MEMINFO = "MemTotal:        8000000 kB\nMemFree:          100000 kB\nMemAvailable:    4000000 kB\n"
STATUS = (
    "Name:\tpython\nVmPeak:\t  900000 kB\nVmHWM:\t   41000 kB\nVmRSS:\t   32000 kB\n"
    "RssAnon:\t   15000 kB\nRssFile:\t   16000 kB\nRssShmem:\t    1000 kB\nVmData:\t 1 kB\n"
)
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
V1_MOUNTS = (
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)
KIB = 1024


def tree(root: Path, files: dict[str, str]) -> Linux:
    for name, content in {"proc/meminfo": MEMINFO, "proc/self/status": STATUS, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return Linux(root)


def v2(root: Path, files: dict[str, str], group: str = "/user/edge", mounts: str = V2_MOUNT) -> Linux:
    return tree(root, {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mounts, **files})


def test_counters_come_from_one_status(tmp_path: Path) -> None:
    linux = tree(tmp_path, {})
    assert linux.memory_counters() == (32000 * KIB, 41000 * KIB, 16000 * KIB, 16000 * KIB)
    assert (linux.rss_bytes(), linux.peak_rss_bytes()) == (32000 * KIB, 41000 * KIB)


def test_reset_peak_says_whether_it_could(tmp_path: Path) -> None:
    assert not Linux(tmp_path / "nowhere").reset_peak()
    assert tree(tmp_path, {"proc/self/clear_refs": ""}).reset_peak()
    assert (tmp_path / "proc/self/clear_refs").read_text() == "5"


def test_without_groups_the_device_decides(tmp_path: Path) -> None:
    linux = tree(tmp_path, {})
    assert linux.available_bytes() == 4000000 * KIB
    assert linux.total_bytes() == 8000000 * KIB


def test_v2_limit_less_usage_plus_reclaimable_cache(tmp_path: Path) -> None:
    stat = "anon 5\ninactive_file 3000\nactive_file 1000\nslab_reclaimable 50\n"
    base = "sys/fs/cgroup/user/edge/"
    linux = v2(
        tmp_path,
        {base + "memory.max": "500000000\n", base + "memory.current": "200000000\n", base + "memory.stat": stat},
    )
    assert linux.available_bytes() == 300000000 + 3000 + 500 + 50
    assert linux.total_bytes() == 500000000


def test_v2_every_level_up_counts(tmp_path: Path) -> None:
    files = {
        "sys/fs/cgroup/user/edge/memory.max": "max\n",
        "sys/fs/cgroup/user/edge/memory.current": "1000\n",
        "sys/fs/cgroup/user/memory.max": "90000\n",
        "sys/fs/cgroup/user/memory.high": "50000\n",
        "sys/fs/cgroup/user/memory.current": "20000\n",
    }
    linux = v2(tmp_path, files)
    assert linux.available_bytes() == 30000
    assert linux.total_bytes() == 50000


def test_a_group_over_its_limit_spares_nothing(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/user/edge/"
    assert v2(tmp_path, {base + "memory.high": "1000", base + "memory.current": "2000"}).available_bytes() == 0


def test_in_a_container_the_mount_may_be_the_group_itself(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "7000\n", "sys/fs/cgroup/memory.current": "1000\n"}
    mount = V2_MOUNT.replace(" / /sys", " /docker/abc /sys")
    assert v2(tmp_path, files, group="/docker/abc", mounts=mount).available_bytes() == 6000


def test_a_group_outside_the_mount_falls_back_to_the_mount(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": "7000\n", "sys/fs/cgroup/memory.current": "1000\n"}
    assert v2(tmp_path, files, group="/../other").available_bytes() == 6000


def test_v1_limits_and_their_way_of_saying_none(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/"
    linux = tree(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/a/b\n1:cpu,cpuacct:/\n0::/\n",
            "proc/self/mountinfo": V1_MOUNTS,
            base + "a/b/memory.limit_in_bytes": "9223372036854771712",
            base + "a/b/memory.usage_in_bytes": "10",
            base + "a/memory.limit_in_bytes": "800000",
            base + "a/memory.usage_in_bytes": "300000",
            base + "a/memory.stat": "inactive_file 1\ntotal_inactive_file 2000\ntotal_active_file 400\n",
        },
    )
    assert linux.available_bytes() == 500000 + 2000 + 200
    assert linux.total_bytes() == 800000


PSI = "some avg10={} avg60=0.50 avg300=0.00 total=99\nfull avg10=9.00 avg60=0.00 avg300=0.00 total=1\n"


def test_pressure_of_the_device(tmp_path: Path) -> None:
    assert tree(tmp_path, {}).pressure() == Pressure(8000000 * KIB, 4000000 * KIB)
    assert tree(tmp_path, {"proc/pressure/memory": PSI.format("2.50")}).pressure().stalled == 0.025


def test_pressure_of_a_v2_group_is_its_own(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/user/edge/"
    files = {
        "proc/pressure/memory": PSI.format("80.00"),
        base + "memory.pressure": PSI.format("0.00"),
        base + "memory.max": "500000000\n",
        base + "memory.current": "200000000\n",
        base + "memory.events": "low 7\nhigh 3\nmax 2\noom 1\noom_kill 1\n",
        "sys/fs/cgroup/user/memory.max": "600000000\n",
        "sys/fs/cgroup/user/memory.current": "550000000\n",
        "sys/fs/cgroup/user/memory.events": "high 0\nmax 40\n",
    }
    linux = v2(tmp_path, files)
    assert linux.pressure() == Pressure(500000000, 50000000, 0.0, 45)
    (tmp_path / base / "memory.pressure").unlink()
    assert linux.pressure().stalled == 0, "the stalls of the device may be those of others"


def test_pressure_of_a_v1_group(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/a/"
    files = {
        "proc/pressure/memory": PSI.format("10.00"),
        "proc/self/cgroup": "4:memory:/a\n0::/\n",
        "proc/self/mountinfo": V1_MOUNTS,
        base + "memory.limit_in_bytes": "800000",
        base + "memory.usage_in_bytes": "300000",
        base + "memory.failcnt": "12",
    }
    linux = tree(tmp_path, files)
    assert linux.pressure() == Pressure(800000, 500000, 0.0, 12)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/\n0::/\n")
    assert linux.pressure() == Pressure(8000000 * KIB, 4000000 * KIB, 0.1), "the process has left the group"


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [({0, 1, 2, 3}, None, 2), ({0, 2}, None, 1), ({0, 1, 2, 3}, "150000 100000", 1), ({0, 1}, "50000 100000", 1),
     ({0, 1, 2, 3}, "max 100000", 2), ({7}, None, 1)],
)  # fmt: skip
def test_cores_are_physical_usable_and_within_the_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, affinity: set[int], quota: str | None, expected: int
) -> None:
    topology = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}\n"
        for cpu in range(4)
    }
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: affinity)
    limits = {"sys/fs/cgroup/user/cpu.max": quota + "\n"} if quota else {}
    assert v2(tmp_path, topology | limits).cores() == expected


def test_v1_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    files = {
        "proc/self/cgroup": "1:cpu,cpuacct:/x\n",
        "proc/self/mountinfo": V1_MOUNTS,
        "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "300000",
        "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert tree(tmp_path, files).cores() == 3


def test_this_machine_is_plausible() -> None:
    here = current_platform()
    resident, peak, anonymous, files = here.memory_counters()
    assert 1 << 20 < resident <= peak < here.total_bytes()
    assert anonymous + files == resident
    assert 0 < here.available_bytes() <= here.total_bytes()
    assert 0 < here.pressure().available_bytes <= here.pressure().total_bytes
    assert 0 <= here.pressure().stalled <= 1
    assert 1 <= here.cores() <= (os.cpu_count() or 1)


def test_dropping_the_cache_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    here = current_platform()
    handle = here.open_buffered(str(path))
    try:
        view = memoryview(bytearray(8))
        assert here.read(handle, view, 1) == 2
        assert bytes(view[:2]) == b"bc"
        assert here.identity(handle)[0] == 3
        here.drop_cache(handle)
    finally:
        here.close(handle)
