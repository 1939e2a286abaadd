"""Windows: unbuffered overlapped reads, working set, global memory status. Knows nothing of models or plans."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

from edgelm.memory.platform.base import Pressure

_GENERIC_READ, _GENERIC_WRITE = 0x80000000, 0x40000000
_SHARE_ALL = 0x1 | 0x2 | 0x4  # others may read, write and delete, as on POSIX
_CREATE_NEW, _OPEN_EXISTING = 1, 3
_FLAG_DELETE_ON_CLOSE = 0x04000000
_FLAG_NO_BUFFERING = 0x20000000
_FLAG_OVERLAPPED = 0x40000000  # without it the system lets one read of a handle wait for the other
_FLAG_RANDOM_ACCESS = 0x10000000
_INVALID_HANDLE = ctypes.c_void_p(-1).value
_ERROR_HANDLE_EOF, _ERROR_IO_PENDING = 38, 997
_TICKS_TO_NS = 100


class Overlapped(ctypes.Structure):
    """`OVERLAPPED` of minwinbase.h."""

    _fields_ = (
        ("Internal", ctypes.c_void_p),
        ("InternalHigh", ctypes.c_void_p),
        ("Offset", ctypes.c_uint32),
        ("OffsetHigh", ctypes.c_uint32),
        ("hEvent", ctypes.c_void_p),
    )


class ProcessMemoryCountersEx(ctypes.Structure):
    """`PROCESS_MEMORY_COUNTERS_EX` of psapi.h."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        ("PeakWorkingSetSize", ctypes.c_size_t),
        ("WorkingSetSize", ctypes.c_size_t),
        ("_quotas", ctypes.c_size_t * 4),
        ("PagefileUsage", ctypes.c_size_t),
        ("PeakPagefileUsage", ctypes.c_size_t),
        ("PrivateUsage", ctypes.c_size_t),
    )


class MemoryStatusEx(ctypes.Structure):
    """`MEMORYSTATUSEX` of sysinfoapi.h."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("_others", ctypes.c_uint64 * 5),
    )


def _kernel32() -> Any:
    library = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined,unused-ignore]
    library.CreateFileW.restype = ctypes.c_void_p
    library.CreateEventW.restype = ctypes.c_void_p
    library.GetCurrentProcess.restype = ctypes.c_void_p
    return library


def _last_error() -> int:
    return int(ctypes.get_last_error())  # type: ignore[attr-defined,unused-ignore]


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


class Windows:
    """`kernel32`, `last_error` and `physical_cores` are the system's, or doubles."""

    name = "windows"
    direct_how = "FILE_FLAG_NO_BUFFERING"

    def __init__(
        self,
        kernel32: Any = None,
        last_error: Callable[[], int] = _last_error,
        physical_cores: Callable[[], int] = _physical_cores,
    ) -> None:
        self._kernel32 = kernel32 or _kernel32()
        self._last_error, self._physical_cores = last_error, physical_cores

    # -- files -----------------------------------------------------------------------------------------

    def open_direct(self, path: str) -> int:
        return self._open(path, _FLAG_NO_BUFFERING)

    def open_buffered(self, path: str) -> int:
        return self._open(path, _FLAG_RANDOM_ACCESS)

    def open_scratch(self, path: str, n_bytes: int) -> int:
        access, flags = _GENERIC_READ | _GENERIC_WRITE, _FLAG_NO_BUFFERING | _FLAG_DELETE_ON_CLOSE
        return self._open(path, flags, access, _CREATE_NEW)  # grows as it is written: the room was looked up before

    def _open(self, path: str, flag: int, access: int = _GENERIC_READ, how: int = _OPEN_EXISTING) -> int:
        handle = self._kernel32.CreateFileW(
            ctypes.c_wchar_p(path), access, _SHARE_ALL, None, how, flag | _FLAG_OVERLAPPED, None
        )
        if handle in (None, _INVALID_HANDLE):
            raise self._error("opening", path)
        return int(handle)

    def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
        if uncached:
            raise OSError("this system has no uncached buffered reads")
        return self._moved("reading", handle, view, offset) if len(view) else 0

    def write(self, handle: int, view: memoryview, offset: int) -> int:
        return self._moved("writing", handle, view, offset)

    def _moved(self, action: str, handle: int, view: memoryview, offset: int) -> int:
        """Read or write at `offset`, and wait for it; return the bytes moved."""
        event = self._kernel32.CreateEventW(None, True, False, None)
        if not event:
            raise self._error("preparing a transfer")
        try:
            request = Overlapped(Offset=offset & 0xFFFFFFFF, OffsetHigh=offset >> 32, hEvent=event)
            return self._overlapped(action, handle, view, request)
        finally:
            self._kernel32.CloseHandle(ctypes.c_void_p(event))

    def _overlapped(self, action: str, handle: int, view: memoryview, request: Overlapped) -> int:
        n_moved = ctypes.c_uint32(0)
        target = ctypes.byref(ctypes.c_char.from_buffer(view))
        call = self._kernel32.ReadFile if action == "reading" else self._kernel32.WriteFile
        done = call(ctypes.c_void_p(handle), target, ctypes.c_uint32(len(view)), None, ctypes.byref(request))
        if done or (error := self._last_error()) == _ERROR_IO_PENDING:
            done = self._kernel32.GetOverlappedResult(
                ctypes.c_void_p(handle), ctypes.byref(request), ctypes.byref(n_moved), True
            )
            error = 0 if done else self._last_error()
        if error == _ERROR_HANDLE_EOF:
            return 0
        if error:
            raise self._error(action, code=error)
        return n_moved.value

    def identity(self, handle: int) -> tuple[int, int]:
        size, written = ctypes.c_int64(0), ctypes.c_uint64(0)
        if not self._kernel32.GetFileSizeEx(ctypes.c_void_p(handle), ctypes.byref(size)):
            raise self._error("asking for the size of a file")
        if not self._kernel32.GetFileTime(ctypes.c_void_p(handle), None, None, ctypes.byref(written)):
            raise self._error("asking for the time of a file")
        return size.value, written.value * _TICKS_TO_NS

    def drop_cache(self, handle: int) -> None:
        """Do nothing: cached pages go to the standby list, and no call takes one file's pages from there."""

    def cached_bytes(self, handle: int, offset: int, n_bytes: int) -> int:
        return 0  # the standby list cannot be asked about one file

    def close(self, handle: int) -> None:
        self._kernel32.CloseHandle(ctypes.c_void_p(handle))

    def _error(self, action: str, path: str | None = None, code: int | None = None) -> OSError:
        code = self._last_error() if code is None else code
        # the third and fourth argument make Python choose FileNotFoundError and its kin on Windows
        return OSError(0, f"{action} failed with Windows error {code}", path, code)

    # -- this process ----------------------------------------------------------------------------------

    def memory_counters(self) -> tuple[int, int, int, int]:
        counters = ProcessMemoryCountersEx()
        counters.cb = ctypes.sizeof(counters)
        process = ctypes.c_void_p(self._kernel32.GetCurrentProcess())
        if not self._kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
            raise self._error("asking for the memory of this process")
        resident = counters.WorkingSetSize
        private = min(counters.PrivateUsage, resident)
        return resident, counters.PeakWorkingSetSize, private, resident - private

    def rss_bytes(self) -> int:
        return self.memory_counters()[0]

    def peak_rss_bytes(self) -> int:
        return self.memory_counters()[1]

    def reset_peak(self) -> bool:
        return False  # the peak working set cannot be reset

    # -- the device ------------------------------------------------------------------------------------

    def available_bytes(self) -> int:
        return int(self._memory_status().ullAvailPhys)

    def total_bytes(self) -> int:
        return int(self._memory_status().ullTotalPhys)

    def pressure(self) -> Pressure:
        status = self._memory_status()
        return Pressure(int(status.ullTotalPhys), int(status.ullAvailPhys))

    def _memory_status(self) -> MemoryStatusEx:
        status = MemoryStatusEx()
        status.dwLength = ctypes.sizeof(status)
        if not self._kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            raise self._error("asking for the memory of the device")
        return status

    def cores(self) -> int:
        return max(self._physical_cores(), 1)
