"""Read byte ranges of a model's files into memory that the caller owns, without leaving them in the page cache.

Knows files, offsets and alignment; nothing of units, tensors or plans. Every store puts the same bytes at
the same place, so that a plan does not depend on which one is used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from edgelm.errors import ConfigError, ModelFileError
from edgelm.files.errors import TruncatedFile
from edgelm.memory.buffer import PAGE, Buffer, align_down, align_up
from edgelm.memory.platform import Platform, current_platform
from edgelm.sizes import human


def span(offset: int, n_bytes: int) -> int:
    """Return the room in bytes that reading [offset, offset + n_bytes) needs: whole blocks of 4096."""
    return align_up(offset + n_bytes) - align_down(offset) if n_bytes else 0


def check_request(offset: int, n_bytes: int, buffer: memoryview, at: int) -> None:
    """Assert what `Store.read_into` asks of its caller."""
    assert offset >= 0, offset
    assert n_bytes >= 0, n_bytes
    assert at % PAGE == 0, at
    assert at + span(offset, n_bytes) <= len(buffer), "the caller left too little room"


class Store(Protocol):
    """Byte ranges of numbered files. One contract suite holds for all: `edgelm.testing.store_contract`."""

    @property
    def how(self) -> str:
        """How reads reach the flash, in words for people."""
        ...

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        """Put the bytes [offset, offset + n_bytes) of `file` into `buffer`; return where the first one lies.

        That is always `at + offset % 4096`: direct reads fetch whole blocks, so `at` must be a multiple of
        4096 in a page-aligned buffer, and `span(offset, n_bytes)` bytes from `at` on may be written.
        Allocates nothing that grows with the size; safe in several threads at once.
        Raises `TruncatedFile` if the file ends early, `ModelFileError` if it changed or cannot be read.
        """
        ...

    def close(self) -> None:
        """Give the files back. No read may be running."""
        ...


class _FileStore:
    """Whole aligned blocks by positional reads; the subclasses differ in how the page cache stays empty."""

    how: str

    def __init__(self, paths: Sequence[str], platform: Platform) -> None:
        self._platform = platform
        self._paths = tuple(str(path) for path in paths)
        self._handles: list[int] = []
        self._identities: list[tuple[int, int]] = []
        try:
            for path in self._paths:
                self._handles.append(self._open(path))
                self._identities.append(platform.identity(self._handles[-1]))
                self._probe(len(self._handles) - 1)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str) -> int:
        return self._platform.open_buffered(path)

    def _read(self, handle: int, view: memoryview, offset: int) -> int:
        return self._platform.read(handle, view, offset)

    def _after_read(self, handle: int) -> None:
        """Do what the way of reading needs once the bytes are there."""

    def _probe(self, file: int) -> None:
        """Read the first and the last block: file systems refuse at the read, some only at the odd tail."""
        size = self._identities[file][0]
        if size == 0:
            return
        with Buffer(PAGE) as block:
            for start in {0, align_down(size - 1)}:
                self._read(self._handles[file], block.view, start)
        self._after_read(self._handles[file])

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        check_request(offset, n_bytes, buffer, at)
        handle, lead = self._handles[file], offset % PAGE
        if offset + n_bytes > self._identities[file][0]:
            raise self._ends_early(file, offset, n_bytes, self._identities[file][0])
        if n_bytes == 0:
            return at + lead
        start, room = offset - lead, span(offset, n_bytes)
        done = 0
        try:
            while done < lead + n_bytes:
                # after a short read the last block is read again, because a direct read must begin at a block
                done = align_down(done)
                got = self._read(handle, buffer[at + done : at + room], start + done)
                if got == 0 or (got < PAGE and done + got < lead + n_bytes):
                    raise self._ends_early(file, offset, n_bytes, self._platform.identity(handle)[0])
                done += got
            self._after_read(handle)
            identity = self._platform.identity(handle)
        except OSError as exc:
            raise ModelFileError(
                self._paths[file],
                f"reading {n_bytes} bytes at {offset} failed ({exc.strerror or exc})",
                "check the drive that holds it",
            ) from exc
        if identity != self._identities[file]:
            raise self._changed(file)
        return at + lead

    def _ends_early(self, file: int, offset: int, n_bytes: int, size: int) -> ModelFileError:
        if size != self._identities[file][0]:
            return TruncatedFile(
                self._paths[file],
                f"the file changed while it was open: it has {size} bytes and had {self._identities[file][0]}",
                "load the model again when nothing writes to it",
            )
        return TruncatedFile(
            self._paths[file], f"the file ends at {size}, before byte {offset + n_bytes} that its header promises"
        )

    def _changed(self, file: int) -> ModelFileError:
        return ModelFileError(
            self._paths[file],
            "the file changed while it was open",
            "load the model again when nothing writes to it",
        )

    def close(self) -> None:
        while self._handles:
            self._platform.close(self._handles.pop())


class DirectStore(_FileStore):
    """Reads past the page cache. Raises `OSError` at construction where a file system refuses."""

    def __init__(self, paths: Sequence[str], platform: Platform | None = None) -> None:
        platform = platform or current_platform()
        self.how = f"direct ({platform.direct_how})"
        super().__init__(paths, platform)

    def _open(self, path: str) -> int:
        return self._platform.open_direct(path)


class DontCacheStore(_FileStore):
    """Takes what the page cache holds already and adds nothing to it (Linux 6.14 or newer).

    The way to load weights that stay: at memory speed when they are cached. Costs three to five times the
    processor time of direct reads when they are not. Raises `OSError` at construction where it is unknown.
    """

    how = "uncached (RWF_DONTCACHE)"

    def __init__(self, paths: Sequence[str], platform: Platform | None = None) -> None:
        super().__init__(paths, platform or current_platform())

    def _read(self, handle: int, view: memoryview, offset: int) -> int:
        return self._platform.read(handle, view, offset, uncached=True)


class WarmStore:
    """For weights that stay: takes what the page cache holds at memory speed, and reads the rest past it.

    `direct` serves what is not cached. Raises `OSError` at construction where cached reads cannot stay uncached.
    """

    def __init__(self, paths: Sequence[str], direct: Store, platform: Platform | None = None) -> None:
        self._platform = platform or current_platform()
        self._direct, self._cached = direct, DontCacheStore(paths, self._platform)
        self.how = f"what is cached from the page cache, the rest {direct.how}"

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        handle = self._cached._handles[file]
        warm = 2 * self._platform.cached_bytes(handle, offset, n_bytes) > n_bytes
        return (self._cached if warm else self._direct).read_into(file, offset, n_bytes, buffer, at)

    def close(self) -> None:
        """Give its own files back; those of `direct` belong to others."""
        self._cached.close()


class BufferedStore(_FileStore):
    """Ordinary reads, after each of which the whole file is dropped from the page cache again.

    The last resort: for the moment of a read, its bytes are in memory twice.
    """

    how = "buffered, cache dropped after each read"

    def __init__(self, paths: Sequence[str], platform: Platform | None = None) -> None:
        super().__init__(paths, platform or current_platform())

    def _after_read(self, handle: int) -> None:
        self._platform.drop_cache(handle)


class MemoryStore:
    """Files that are already in memory: for tests, and for models that a program made itself."""

    how = "memory"

    def __init__(self, files: Sequence[bytes | bytearray | memoryview]) -> None:
        self._files = tuple(memoryview(file).cast("B") for file in files)

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        check_request(offset, n_bytes, buffer, at)
        content = self._files[file]
        if offset + n_bytes > len(content):
            raise TruncatedFile(
                f"file {file} in memory", f"it ends at {len(content)}, before byte {offset + n_bytes}", "build it again"
            )
        first = at + offset % PAGE
        buffer[first : first + n_bytes] = content[offset : offset + n_bytes]
        return first

    def close(self) -> None:
        self._files = ()


class ThrottledStore:
    """A slower device: `store` behind one queue that serves `bytes_per_s` and takes `latency_s` for each read.

    The device is busy with one read at a time, whichever thread asks, so the time of a set of reads does not
    depend on the number of threads. `clock` and `sleep` are for tests.
    """

    def __init__(
        self,
        store: Store,
        bytes_per_s: float,
        latency_s: float = 0.0,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not bytes_per_s > 0 or not latency_s >= 0:
            raise ConfigError(
                f"a throttle needs a speed above 0 and a latency of 0 or more, got {bytes_per_s} B/s and {latency_s} s"
            )
        self._store, self._bytes_per_s, self._latency_s = store, bytes_per_s, latency_s
        self._clock, self._sleep = clock, sleep
        self._lock, self._free_at = threading.Lock(), [clock()]  # one number, which several stores may share

    @property
    def how(self) -> str:
        return f"{self._store.how}, throttled to {human(self._bytes_per_s)}/s and {self._latency_s * 1e3:g} ms"

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        with self._lock:
            begin = max(self._clock(), self._free_at[0])
            done = self._free_at[0] = begin + self._latency_s + span(offset, n_bytes) / self._bytes_per_s
        first = self._store.read_into(file, offset, n_bytes, buffer, at)
        if (rest := done - self._clock()) > 0:
            self._sleep(rest)
        return first

    def beside(self, store: Store) -> ThrottledStore:
        """Return another store on the same device: reads of the two wait for each other."""
        other = ThrottledStore(store, self._bytes_per_s, self._latency_s, clock=self._clock, sleep=self._sleep)
        other._lock, other._free_at = self._lock, self._free_at
        return other

    def close(self) -> None:
        self._store.close()


class ReadCounts(NamedTuple):
    """What went through a store. `read_bytes` are whole blocks from flash, `wanted_bytes` what was asked for.

    `read_s` adds up over threads; `busy_s` is the time in which at least one read was under way.
    """

    n_reads: int = 0
    wanted_bytes: int = 0
    read_bytes: int = 0
    read_s: float = 0.0
    busy_s: float = 0.0

    def __sub__(self, earlier: ReadCounts) -> ReadCounts:
        """Return what happened between two snapshots."""
        return ReadCounts(
            self.n_reads - earlier.n_reads,
            self.wanted_bytes - earlier.wanted_bytes,
            self.read_bytes - earlier.read_bytes,
            self.read_s - earlier.read_s,
            self.busy_s - earlier.busy_s,
        )


class CountingStore:
    """`store` with counters; a read that fails counts its time and no bytes."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._counts = ReadCounts()
        self._n_active, self._busy_since = 0, 0.0

    @property
    def how(self) -> str:
        return self._store.how

    def snapshot(self) -> ReadCounts:
        """Return the counts so far. Safe in any thread."""
        with self._lock:
            return self._counts

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        with self._lock:
            begin = self._clock()
            self._n_active += 1
            if self._n_active == 1:
                self._busy_since = begin
        n_done = 0
        try:
            first = self._store.read_into(file, offset, n_bytes, buffer, at)
            n_done = 1
        finally:
            with self._lock:
                self._count(n_done, n_bytes, span(offset, n_bytes), begin)
        return first

    def _count(self, n_done: int, n_bytes: int, read_bytes: int, begin: float) -> None:
        now, before = self._clock(), self._counts
        self._n_active -= 1
        self._counts = ReadCounts(
            before.n_reads + n_done,
            before.wanted_bytes + n_done * n_bytes,
            before.read_bytes + n_done * read_bytes,
            before.read_s + now - begin,
            before.busy_s + now - self._busy_since,
        )
        self._busy_since = now

    def close(self) -> None:
        self._store.close()


def open_store(
    paths: Sequence[str], *, direct: bool | None = None, platform: Platform | None = None
) -> tuple[Store, str]:
    """Open the files of a model with the best way of reading that they all allow, and say which it is.

    `direct` None tries direct, then uncached, then buffered reads; True accepts nothing less than direct
    reads; False begins at uncached ones. Raises `ModelFileError` if a file cannot be opened or read at all.
    """
    platform = platform or current_platform()
    refusals: list[str] = []
    kinds: dict[str, type[DirectStore | DontCacheStore | BufferedStore]] = {
        "direct": DirectStore,
        "uncached": DontCacheStore,
        "buffered": BufferedStore,
    }
    if direct is not None:
        kinds = {name: kind for name, kind in kinds.items() if (name == "direct") == direct}
    for name, kind in kinds.items():
        try:
            store = kind(paths, platform)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as exc:
            raise ModelFileError(exc.filename, f"cannot be opened ({exc.strerror})", "check its path") from exc
        except OSError as exc:
            refusals.append(f"{name} reads: {exc.strerror or exc}")
            continue
        return store, store.how + (f"; refused: {', '.join(refusals)}" if refusals else "")
    raise ModelFileError(", ".join(map(str, paths)), f"cannot be read ({'; '.join(refusals)})", _hint_for(direct))


def _hint_for(direct: bool | None) -> str:
    return "allow buffered reads for this file system" if direct else "check its path and permissions"


def open_loader(paths: Sequence[str], store: Store, platform: Platform | None = None) -> Store:
    """Return the best store for weights that are read once and stay: a `WarmStore`, or `store` where that fails."""
    if not isinstance(store, DirectStore):
        return store
    try:
        return WarmStore(paths, store, platform)
    except OSError:
        return store
