"""macOS: physical footprint by proc_pid_rusage, F_NOCACHE, vm statistics. Knows nothing of models or plans.

The footprint, not the resident size, is what the system's own limits and Activity Monitor count. Buffers of a GPU are
part of it as IOKit mappings, in full, wired or not (the ledger `phys_footprint` in XNU's osfmk/kern/task.c).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import fcntl
import os
from collections.abc import Callable
from typing import Any

from edgelm.memory.platform.base import PosixFiles, Pressure

_F_NOCACHE = 48  # sys/fcntl.h; the name exists in Python on macOS only
_RUSAGE_INFO_V4 = 4  # sys/resource.h
_HOST_VM_INFO64 = 4  # mach/host_info.h


class RusageInfoV4(ctypes.Structure):
    """`struct rusage_info_v4` of sys/resource.h, all 296 bytes; the fields between those used are unnamed."""

    _fields_ = (
        ("ri_uuid", ctypes.c_uint8 * 16),
        ("_times", ctypes.c_uint64 * 6),
        ("ri_resident_size", ctypes.c_uint64),
        ("ri_phys_footprint", ctypes.c_uint64),
        ("_children_disk_qos", ctypes.c_uint64 * 20),
        ("ri_lifetime_max_phys_footprint", ctypes.c_uint64),
        ("_rest", ctypes.c_uint64 * 6),
    )


class VmStatistics64(ctypes.Structure):
    """`struct vm_statistics64` of mach/vm_statistics.h."""

    _fields_ = (
        ("free_count", ctypes.c_uint32),
        ("active_count", ctypes.c_uint32),
        ("inactive_count", ctypes.c_uint32),
        ("wire_count", ctypes.c_uint32),
        ("_events", ctypes.c_uint64 * 9),
        ("purgeable_count", ctypes.c_uint32),
        ("speculative_count", ctypes.c_uint32),
        ("_swap", ctypes.c_uint64 * 4),
        ("compressor_page_count", ctypes.c_uint32),
        ("throttled_count", ctypes.c_uint32),
        ("external_page_count", ctypes.c_uint32),
        ("internal_page_count", ctypes.c_uint32),
        ("total_uncompressed_pages_in_compressor", ctypes.c_uint64),
    )


class MacOS(PosixFiles):
    """`library` is libSystem, or a double with the same functions; `control` is fcntl."""

    name = "macos"
    direct_how = "F_NOCACHE"

    def __init__(self, library: Any = None, control: Callable[[int, int, int], Any] = fcntl.fcntl) -> None:
        self._library = library or ctypes.CDLL(ctypes.util.find_library("System"), use_errno=True)
        self._control = control

    # -- files -----------------------------------------------------------------------------------------

    def open_direct(self, path: str) -> int:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._control(handle, _F_NOCACHE, 1)
        except OSError:
            os.close(handle)
            raise
        return handle

    def open_scratch(self, path: str, n_bytes: int) -> int:
        handle = self._open_unlinked(path, n_bytes)
        try:
            self._control(handle, _F_NOCACHE, 1)
        except OSError:
            os.close(handle)
            raise
        return handle

    def drop_cache(self, handle: int) -> None:
        """Switch caching off for the handle: no call here drops pages that are cached already."""
        self._control(handle, _F_NOCACHE, 1)

    # -- this process ----------------------------------------------------------------------------------

    def memory_counters(self) -> tuple[int, int, int, int]:
        usage = RusageInfoV4()
        if self._library.proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, ctypes.byref(usage)) != 0:
            raise OSError("proc_pid_rusage failed")
        footprint = usage.ri_phys_footprint
        # the footprint leaves clean file pages out, so what is resident beyond it is file-backed
        files = max(usage.ri_resident_size - footprint, 0)
        return footprint, max(usage.ri_lifetime_max_phys_footprint, footprint), footprint, files

    def rss_bytes(self) -> int:
        return self.memory_counters()[0]

    def peak_rss_bytes(self) -> int:
        return self.memory_counters()[1]

    def reset_peak(self) -> bool:
        return False  # the lifetime maximum cannot be reset

    # -- the device ------------------------------------------------------------------------------------

    def available_bytes(self) -> int:
        facts = VmStatistics64()
        count = ctypes.c_uint32(ctypes.sizeof(facts) // 4)
        host = self._library.mach_host_self()
        if self._library.host_statistics64(host, _HOST_VM_INFO64, ctypes.byref(facts), ctypes.byref(count)) != 0:
            raise OSError("host_statistics64 failed")
        # inactive pages that no file backs would have to be compressed first, so they do not count
        pages = facts.free_count + facts.purgeable_count + min(facts.inactive_count, facts.external_page_count)
        return int(pages) * self._sysctl(b"hw.pagesize")

    def total_bytes(self) -> int:
        return self._sysctl(b"hw.memsize")

    def pressure(self) -> Pressure:
        # DISPATCH_MEMORYPRESSURE_NORMAL, WARN and CRITICAL are 1, 2 and 4
        level = {1: 0, 2: 1, 4: 2}.get(self._sysctl(b"kern.memorystatus_vm_pressure_level"), 0)
        return Pressure(self.total_bytes(), self.available_bytes(), level=level)

    def cores(self) -> int:
        return max(self._sysctl(b"hw.physicalcpu"), 1)

    def _sysctl(self, name: bytes) -> int:
        value = ctypes.c_uint64(0)  # little-endian, so a 4-byte answer reads the same
        size = ctypes.c_size_t(ctypes.sizeof(value))
        if self._library.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
            raise OSError(f"sysctl {name.decode()} failed")
        return value.value
