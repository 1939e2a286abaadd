"""Windows by substitution: a kernel32 over a bytes object, overlapped reads included."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from edgelm.memory.platform.base import Pressure
from edgelm.memory.platform.windows import MemoryStatusEx, Overlapped, ProcessMemoryCountersEx, Windows

CONTENT = bytes(range(256)) * 40
FILE, EVENT = 11, 22


class FakeKernel32:
    """Reads are always pending first, as unbuffered overlapped reads are."""

    def __init__(self) -> None:
        self.error, self.flags, self.n_open, self.fails = 0, 0, 0, False
        self._pending = 0

    def CreateFileW(self, path: Any, access: int, share: int, _s: None, how: int, flags: int, _t: None) -> int | None:
        assert (access, share, how) in ((0x80000000, 7, 3), (0xC0000000, 7, 1))
        self.flags = flags
        if path.value.endswith("missing"):
            self.error = 2
            return ctypes.c_void_p(-1).value
        self.n_open += 1
        return FILE

    def CreateEventW(self, *_: Any) -> int:
        self.n_open += 1
        return EVENT

    def CloseHandle(self, handle: Any) -> int:
        assert handle.value in (FILE, EVENT)
        self.n_open -= 1
        return 1

    def ReadFile(self, handle: Any, target: Any, n_bytes: Any, _n_read: None, request: Any) -> int:
        assert (handle.value, request._obj.hEvent) == (FILE, EVENT)
        offset = request._obj.Offset | request._obj.OffsetHigh << 32
        part = CONTENT[offset : offset + n_bytes.value]
        if not part or self.fails:
            self.error = 1117 if self.fails else 38
            return 0
        ctypes.memmove(target, part, len(part))
        self._pending, self.error = len(part), 997
        return 0

    def WriteFile(self, handle: Any, source: Any, n_bytes: Any, _n_written: None, request: Any) -> int:
        assert (handle.value, request._obj.hEvent) == (FILE, EVENT)
        self.written = (request._obj.Offset, ctypes.string_at(source, n_bytes.value))
        self._pending, self.error = n_bytes.value, 997
        return 0

    def GetOverlappedResult(self, handle: Any, request: Any, n_read: Any, wait: bool) -> int:
        assert wait
        n_read._obj.value = self._pending
        return 1

    def GetFileSizeEx(self, handle: Any, size: Any) -> int:
        size._obj.value = len(CONTENT)
        return not self.fails

    def GetFileTime(self, handle: Any, _created: None, _accessed: None, written: Any) -> int:
        written._obj.value = 123
        return 1

    def GetCurrentProcess(self) -> int:
        return -1

    def K32GetProcessMemoryInfo(self, process: Any, counters: Any, size: int) -> int:
        assert size == counters._obj.cb == ctypes.sizeof(ProcessMemoryCountersEx)
        counters._obj.WorkingSetSize, counters._obj.PeakWorkingSetSize = 50, 80
        counters._obj.PrivateUsage = 30
        return not self.fails

    def GlobalMemoryStatusEx(self, status: Any) -> int:
        assert status._obj.dwLength == 64
        status._obj.ullTotalPhys, status._obj.ullAvailPhys = 8000, 3000
        return not self.fails


@pytest.fixture
def kernel() -> FakeKernel32:
    return FakeKernel32()


@pytest.fixture
def windows(kernel: FakeKernel32) -> Windows:
    return Windows(kernel, last_error=lambda: kernel.error, physical_cores=lambda: 4)


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="sizes of 64-bit systems")
def test_structures_have_the_sizes_of_the_headers() -> None:
    sizes = [ctypes.sizeof(kind) for kind in (Overlapped, ProcessMemoryCountersEx, MemoryStatusEx)]
    assert sizes == [32, 80, 64]


@pytest.mark.parametrize(("how", "flag"), [("open_direct", 0x20000000), ("open_buffered", 0x10000000)])
def test_reads_are_positional_and_events_are_closed(
    windows: Windows, kernel: FakeKernel32, how: str, flag: int
) -> None:
    handle = getattr(windows, how)("C:\\model.gguf")
    assert kernel.flags == flag | 0x40000000
    view = memoryview(bytearray(4096))
    assert windows.read(handle, view, 4096) == 4096
    assert bytes(view) == CONTENT[4096:8192]
    assert windows.read(handle, view, 8192) == len(CONTENT) - 8192
    assert windows.read(handle, view, 1 << 33) == 0
    assert windows.read(handle, view[:0], 0) == 0
    assert windows.identity(handle) == (len(CONTENT), 12300)
    windows.drop_cache(handle)
    windows.close(handle)
    assert kernel.n_open == 0


def test_failures_are_os_errors_with_the_code(windows: Windows, kernel: FakeKernel32) -> None:
    with pytest.raises(OSError, match="Windows error 2"):
        windows.open_direct("C:\\missing")
    kernel.fails = True
    with pytest.raises(OSError, match="reading failed with Windows error 1117"):
        windows.read(FILE, memoryview(bytearray(10)), 0)
    with pytest.raises(OSError, match="no uncached"):
        windows.read(FILE, memoryview(bytearray(10)), 0, uncached=True)
    for question in (lambda: windows.identity(FILE), windows.memory_counters, windows.available_bytes):
        with pytest.raises(OSError, match="asking for"):
            question()


def test_counters(windows: Windows) -> None:
    assert windows.memory_counters() == (50, 80, 30, 20)
    assert (windows.rss_bytes(), windows.peak_rss_bytes(), windows.reset_peak()) == (50, 80, False)
    assert (windows.available_bytes(), windows.total_bytes(), windows.cores()) == (3000, 8000, 4)
    assert windows.pressure() == Pressure(8000, 3000)


def test_a_scratch_file_is_written_directly_and_deleted_when_it_is_closed() -> None:
    kernel32 = FakeKernel32()
    system = Windows(kernel32, lambda: kernel32.error)
    handle = system.open_scratch("spilled.tmp", 1 << 20)
    assert kernel32.flags == 0x20000000 | 0x40000000 | 0x04000000
    assert system.write(handle, memoryview(bytearray(b"keys" * 1024)), 8192) == 4096
    assert kernel32.written == (8192, b"keys" * 1024)
    system.close(handle)
    assert kernel32.n_open == 0
