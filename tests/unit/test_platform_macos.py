"""macOS by substitution: the structures have the system's sizes, and the right fields are used."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("needs fcntl", allow_module_level=True)

from edgelm.memory.platform.base import Pressure
from edgelm.memory.platform.macos import MacOS, RusageInfoV4, VmStatistics64

PAGE = 16384


class FakeSystem:
    """The five functions of libSystem that are used, with fixed answers."""

    def __init__(self, *, fails: bool = False, level: int = 1) -> None:
        self.result, self._level = -1 if fails else 0, level

    def proc_pid_rusage(self, pid: int, flavor: int, usage: Any) -> int:
        assert (pid > 0, flavor) == (True, 4)
        usage._obj.ri_resident_size = 50 << 20
        usage._obj.ri_phys_footprint = 40 << 20
        usage._obj.ri_lifetime_max_phys_footprint = 60 << 20
        return self.result

    def mach_host_self(self) -> int:
        return 7

    def host_statistics64(self, host: int, flavor: int, facts: Any, count: Any) -> int:
        assert (host, flavor, count._obj.value) == (7, 4, 38)
        facts._obj.free_count, facts._obj.purgeable_count = 1000, 10
        facts._obj.inactive_count, facts._obj.external_page_count = 500, 200
        return self.result

    def sysctlbyname(self, name: bytes, value: Any, size: Any, _new: None, _length: Any) -> int:
        answers = {b"hw.pagesize": (PAGE, 8), b"hw.memsize": (8 << 30, 8), b"hw.physicalcpu": (6, 4)}
        answers[b"kern.memorystatus_vm_pressure_level"] = (self._level, 4)
        number, n_bytes = answers[name]
        ctypes.memmove(value, number.to_bytes(n_bytes, "little"), n_bytes)
        return self.result


def test_structures_have_the_sizes_of_the_headers() -> None:
    assert ctypes.sizeof(RusageInfoV4) == 296
    assert (RusageInfoV4.ri_phys_footprint.offset, RusageInfoV4.ri_lifetime_max_phys_footprint.offset) == (72, 240)
    assert (ctypes.sizeof(VmStatistics64), VmStatistics64.external_page_count.offset) == (152, 136)


def test_the_footprint_is_what_counts() -> None:
    system = MacOS(FakeSystem())
    assert system.memory_counters() == (40 << 20, 60 << 20, 40 << 20, 10 << 20)
    assert (system.rss_bytes(), system.peak_rss_bytes()) == (40 << 20, 60 << 20)
    assert system.reset_peak() is False


def test_available_counts_free_purgeable_and_inactive_file_pages() -> None:
    system = MacOS(FakeSystem())
    assert system.available_bytes() == (1000 + 10 + 200) * PAGE
    assert system.total_bytes() == 8 << 30
    assert system.cores() == 6


@pytest.mark.parametrize(("told", "level"), [(1, 0), (2, 1), (4, 2)])
def test_the_pressure_level_is_the_systems(told: int, level: int) -> None:
    assert MacOS(FakeSystem(level=told)).pressure() == Pressure(8 << 30, 1210 * PAGE, level=level)


@pytest.mark.parametrize("question", ["memory_counters", "available_bytes", "total_bytes"])
def test_a_refusal_is_an_os_error(question: str) -> None:
    with pytest.raises(OSError, match="failed"):
        getattr(MacOS(FakeSystem(fails=True)), question)()


def test_direct_reads_switch_the_cache_off(tmp_path: Path) -> None:
    calls: list[tuple[int, int, int]] = []
    (tmp_path / "file").write_bytes(b"hello")
    system = MacOS(FakeSystem(), control=lambda *call: calls.append(call))
    handle = system.open_direct(str(tmp_path / "file"))
    view = memoryview(bytearray(5))
    assert system.read(handle, view, 0) == 5
    system.drop_cache(handle)
    with pytest.raises(OSError, match="no uncached"):
        system.read(handle, view, 0, uncached=True)
    system.close(handle)
    assert calls == [(handle, 48, 1), (handle, 48, 1)]
    assert bytes(view) == b"hello"


def test_a_refused_switch_closes_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    opened: list[int] = []

    def refuse(handle: int, _command: int, _value: int) -> None:
        opened.append(handle)
        raise OSError("not here")

    system = MacOS(FakeSystem(), control=refuse)
    with pytest.raises(OSError, match="not here"):
        system.open_direct(str(tmp_path / "file"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        system.identity(opened[0])
