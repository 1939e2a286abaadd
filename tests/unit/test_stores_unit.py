"""What the stores do besides the contract: the choice among them, throttling, counting, the page cache."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from pathlib import Path

import pytest

from edgelm.errors import ConfigError, ModelFileError
from edgelm.memory.buffer import HUGE_PAGE, PAGE, Buffer, OutOfMemory, align_down, align_up
from edgelm.memory.platform.base import PosixFiles
from edgelm.memory.stores import (
    BufferedStore,
    CountingStore,
    DirectStore,
    DontCacheStore,
    MemoryStore,
    ReadCounts,
    ThrottledStore,
    open_store,
    span,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux' page cache")


class RefusingPlatform(PosixFiles):
    """A file system that refuses what it is told to, and counts its open handles."""

    name, direct_how = "fake", "O_FAKE"

    def __init__(self, *, direct: bool = False, uncached: bool = False) -> None:
        self._direct, self._uncached = direct, uncached
        self.n_open = self.n_dropped = 0

    def open_direct(self, path: str) -> int:
        if not self._direct:
            raise OSError(22, "Invalid argument")
        return self.open_buffered(path)

    def open_buffered(self, path: str) -> int:
        handle = super().open_buffered(path)
        self.n_open += 1
        return handle

    def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
        if uncached and not self._uncached:
            raise OSError(95, "Operation not supported")
        return super().read(handle, view, offset)

    def drop_cache(self, handle: int) -> None:
        self.n_dropped += 1

    def close(self, handle: int) -> None:
        self.n_open -= 1
        super().close(handle)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(range(256)) * 64)
    return str(file)


def test_span_is_whole_blocks() -> None:
    assert [span(0, 0), span(0, 1), span(4095, 1), span(4095, 2), span(4096, 4096)] == [0, 4096, 4096, 8192, 4096]
    assert (align_up(1), align_up(4096), align_up(5, 4), align_down(4097)) == (4096, 4096, 8, 4096)


@pytest.mark.parametrize(
    ("platform", "kind", "refusals"),
    [
        (RefusingPlatform(direct=True), DirectStore, []),
        (RefusingPlatform(uncached=True), DontCacheStore, ["direct reads: Invalid argument"]),
        (RefusingPlatform(), BufferedStore, ["direct reads: Invalid", "uncached reads: Operation not supported"]),
    ],
)
def test_the_best_way_that_works_is_taken_and_named(
    path: str, platform: RefusingPlatform, kind: type, refusals: list[str]
) -> None:
    store, description = open_store([path], platform=platform)  # type: ignore[arg-type]
    assert type(store) is kind
    assert description.startswith(store.how)
    assert all(refusal in description for refusal in refusals)
    assert platform.n_open == 1, "a refused attempt must not keep the file open"
    store.close()
    assert platform.n_open == 0


def test_direct_can_be_demanded_or_declined(path: str) -> None:
    with pytest.raises(ModelFileError, match=r"direct reads: Invalid argument.*allow buffered"):
        open_store([path], direct=True, platform=RefusingPlatform(uncached=True))  # type: ignore[arg-type]
    declined, _ = open_store([path], direct=False, platform=RefusingPlatform(direct=True, uncached=True))  # type: ignore[arg-type]
    assert type(declined) is DontCacheStore
    declined.close()


def test_a_file_that_is_not_there_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"missing.gguf: cannot be opened \(No such file"):
        open_store([str(tmp_path / "missing.gguf")])


def test_a_failing_drive_is_a_typed_error(path: str) -> None:
    store = BufferedStore([path])

    class Failing(RefusingPlatform):
        def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
            raise OSError(5, "Input/output error")

    store._platform = Failing()  # type: ignore[assignment]
    with Buffer(PAGE) as buffer, pytest.raises(ModelFileError, match=r"10 bytes at 3 failed \(Input/output error\)"):
        store.read_into(0, 3, 10, buffer.view, 0)


def test_reads_that_come_in_pieces_are_completed(path: str) -> None:
    class Dripping(RefusingPlatform):
        def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
            return super().read(handle, view[:5000], offset)

    store = BufferedStore([path], Dripping())  # type: ignore[arg-type]
    with Buffer(5 * PAGE) as buffer:
        first = store.read_into(0, 100, 16000, buffer.view, 0)
        assert bytes(buffer.view[first : first + 16000]) == (bytes(range(256)) * 64)[100:16100]
    store.close()


def test_a_throttle_takes_the_time_of_the_device() -> None:
    now, naps = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        now[0] += seconds

    slow = ThrottledStore(
        MemoryStore([bytes(64 * PAGE)]), bytes_per_s=PAGE * 100, latency_s=0.5, clock=lambda: now[0], sleep=sleep
    )
    with Buffer(64 * PAGE) as buffer:
        slow.read_into(0, 0, 50 * PAGE, buffer.view, 0)
        assert now[0] == pytest.approx(101.0)
        slow.read_into(0, 10, 10, buffer.view, 0)  # a whole block travels
        assert now[0] == pytest.approx(101.51)
        now[0] += 60.0  # an idle device saves nothing up
        slow.read_into(0, 0, 50 * PAGE, buffer.view, 0)
    assert naps == pytest.approx([1.0, 0.51, 1.0])
    assert "throttled to 410 kB/s and 500 ms" in slow.how
    for speed, latency in ((0, 0), (1, -1), (float("nan"), 0)):
        with pytest.raises(ConfigError, match="throttle"):
            ThrottledStore(MemoryStore([]), speed, latency)


@pytest.mark.parametrize("n_threads", [1, 4])
def test_a_throttle_is_one_device_for_all_threads(n_threads: int) -> None:
    counting = CountingStore(ThrottledStore(MemoryStore([bytes(8 * PAGE)]), PAGE * 400, 0.0025))  # 5 ms a block

    def reader() -> None:
        with Buffer(PAGE) as buffer:
            for _ in range(8 // n_threads):
                counting.read_into(0, 0, PAGE, buffer.view, 0)

    threads = [threading.Thread(target=reader) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = counting.snapshot()
    assert (counts.n_reads, counts.read_bytes) == (8, 8 * PAGE)
    assert counts.busy_s >= 0.0395
    assert counts.read_s >= counts.busy_s * 0.999


def test_counts_tell_flash_from_wanted_bytes_and_busy_from_summed_time() -> None:
    ticks = iter([0.0, 2.0, 5.0, 6.0, 7.0, 7.5])
    counting = CountingStore(MemoryStore([bytes(4 * PAGE)]), clock=lambda: next(ticks))
    with Buffer(2 * PAGE) as buffer:
        counting.read_into(0, 4090, 10, buffer.view, 0)
        before = counting.snapshot()
        assert before == ReadCounts(1, 10, 2 * PAGE, 2.0, 2.0)
        counting.read_into(0, 0, 100, buffer.view, 0)
        with pytest.raises(ModelFileError):
            counting.read_into(0, 0, 5 * PAGE, Buffer(5 * PAGE).view, 0)
    assert counting.snapshot() - before == ReadCounts(1, 100, PAGE, 1.5, 1.5)


@linux_only
@pytest.mark.parametrize("kind", [DirectStore, DontCacheStore, BufferedStore])
def test_no_page_cache_is_left_behind(tmp_path: Path, kind: type[DirectStore | DontCacheStore | BufferedStore]) -> None:
    path, n_bytes, unit = tmp_path / "weights", 8 << 20, (1 << 20) + 777
    path.write_bytes(bytes(n_bytes))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_bytes(path) != 0:
        pytest.skip("this file system cannot drop its cache")
    try:
        store = kind([str(path)])
    except OSError as exc:
        pytest.skip(f"this file system has no {kind.__name__}: {exc}")
    with Buffer(span(PAGE - 1, unit)) as buffer:
        for offset in range(0, n_bytes - unit, unit):
            store.read_into(0, offset, unit, buffer.view, 0)
    store.close()
    assert cached_bytes(path) <= 64 << 10


def cached_bytes(path: Path) -> int:
    """Return how much of the file the page cache holds, by mincore."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        n_pages = -(-len(mapped) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * n_pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages) == 0
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


class TestBuffer:
    @pytest.mark.parametrize("huge", [None, False, True])
    @pytest.mark.parametrize("n_bytes", [1, 5000, HUGE_PAGE, 2 * HUGE_PAGE + 4096])
    def test_memory_is_zeroed_aligned_and_at_its_address(self, n_bytes: int, huge: bool | None) -> None:
        with Buffer(n_bytes, huge=huge) as buffer:
            assert buffer.address % (HUGE_PAGE if huge and n_bytes >= HUGE_PAGE else PAGE) == 0
            assert (len(buffer.view), buffer.n_bytes) == (n_bytes, n_bytes)
            assert buffer.view[0] == buffer.view[-1] == 0
            buffer.view[-1] = 7
            assert ctypes.c_ubyte.from_address(buffer.address + n_bytes - 1).value == 7

    @linux_only
    def test_discarded_pages_are_zero_and_the_others_are_kept(self) -> None:
        page = mmap.PAGESIZE
        with Buffer(4 * page + 10) as buffer:
            buffer.view[:] = b"\1" * len(buffer.view)
            buffer.discard(page - 5, 3 * page + 5)
            assert bytes(buffer.view[:page]) == b"\1" * page
            assert bytes(buffer.view[page : 3 * page]) == bytes(2 * page)
            assert bytes(buffer.view[3 * page :]) == b"\1" * (page + 10)
            buffer.discard(0, 4 * page + 10)
            assert bytes(buffer.view) == bytes(4 * page + 10)

    def test_release_twice_and_with_a_view_alive(self) -> None:
        buffer = Buffer(3 * HUGE_PAGE, huge=True)
        held = buffer.view[PAGE : 2 * PAGE]
        held[0] = 9
        buffer.release()
        buffer.release()
        if sys.platform.startswith("linux"):
            assert held[0] == 0, "the pages are gone though the range is still reserved"

    def test_impossible_sizes(self) -> None:
        with pytest.raises(ConfigError, match="at least one byte"):
            Buffer(0)
        with pytest.raises(OutOfMemory, match=r"refused .* lower --memory"):
            Buffer(1 << 62)
