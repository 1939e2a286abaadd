"""Linux and Android: /proc, control groups of both versions, O_DIRECT. Knows nothing of models or plans."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from edgelm.memory.platform.base import PosixFiles, Pressure

RWF_DONTCACHE = 0x80  # include/uapi/linux/fs.h, since 6.14; Python has no name for it yet
CACHESTAT = 451  # the number of the system call everywhere, since 6.5
_UNLIMITED = 1 << 60  # v1 writes "no limit" as the largest multiple of the page size


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


class Linux(PosixFiles):
    """`root` is where proc and sys are looked for: tests give a made-up tree."""

    name = "linux"
    direct_how = "O_DIRECT"

    def __init__(self, root: str | Path = "/") -> None:
        self._root = Path(root)
        self._status = str(self._root / "proc/self/status")
        self._found_for: str | None = None
        self._found: list[tuple[Path, int]] = []

    # -- files -----------------------------------------------------------------------------------------

    def open_direct(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def open_scratch(self, path: str, n_bytes: int) -> int:
        handle = self._open_unlinked(path, n_bytes, os.O_DIRECT)
        try:
            if n_bytes and _libc().fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(n_bytes)) != 0:
                error = ctypes.get_errno()
                if error != errno.EOPNOTSUPP:  # not posix_fallocate: where that is, it would write zeros
                    raise OSError(error, os.strerror(error))
        except BaseException:
            os.close(handle)
            raise
        return handle

    def open_buffered(self, path: str) -> int:
        handle = super().open_buffered(path)
        # readahead would fill the cache past the range that is read and dropped
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        return handle

    def read(self, handle: int, view: memoryview, offset: int, *, uncached: bool = False) -> int:
        try:
            return os.preadv(handle, [view], offset, RWF_DONTCACHE if uncached else 0)
        except NotImplementedError as error:  # a C library without preadv2: Android's before API level 33
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error

    def cached_bytes(self, handle: int, offset: int, n_bytes: int) -> int:
        wanted, found = (ctypes.c_uint64 * 2)(offset, n_bytes), (ctypes.c_uint64 * 5)()
        if _libc().syscall(ctypes.c_long(CACHESTAT), handle, wanted, found, 0) != 0:
            return 0  # older than Linux 6.5, or a file system that does not count
        return min(int(found[0]) * mmap.PAGESIZE, n_bytes)

    def drop_cache(self, handle: int) -> None:
        # the whole file: large folios straddle a range, and those that straddle it would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    # -- this process ----------------------------------------------------------------------------------

    def memory_counters(self) -> tuple[int, int, int, int]:
        status = self._read_status()
        # shared memory (memfd, tmpfs) cannot be dropped like a file's pages, so it counts as anonymous
        anonymous = _kib(status, b"RssAnon:") + _kib(status, b"RssShmem:")
        return _kib(status, b"VmRSS:"), _kib(status, b"VmHWM:"), anonymous, _kib(status, b"RssFile:")

    def rss_bytes(self) -> int:
        return _kib(self._read_status(), b"VmRSS:")

    def peak_rss_bytes(self) -> int:
        return _kib(self._read_status(), b"VmHWM:")

    def reset_peak(self) -> bool:
        try:
            (self._root / "proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _read_status(self) -> bytes:
        handle = os.open(self._status, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(handle, 8192)
        finally:
            os.close(handle)

    # -- the device ------------------------------------------------------------------------------------

    def available_bytes(self) -> int:
        return self._available(self._bounds())

    def total_bytes(self) -> int:
        return self._total(self._bounds())

    def pressure(self) -> Pressure:
        bounds = self._bounds()
        hits = sum(_limit_hits(bound.folder, bound.version) for bound in bounds)
        own = next((folder for folder, version in self._memory_groups() if version == 2), None)
        stalled = _stalled(own / "memory.pressure") if own else None
        # the device's account is no stand-in within a limit: stalls of other groups would be taken for ours
        if stalled is None and not bounds:
            stalled = _stalled(self._root / "proc/pressure/memory")
        return Pressure(self._total(bounds), self._available(bounds), stalled or 0.0, hits)

    def _available(self, bounds: Sequence[_Bound]) -> int:
        return max(min([self._meminfo("MemAvailable"), *(bound.spare_bytes for bound in bounds)]), 0)

    def _total(self, bounds: Sequence[_Bound]) -> int:
        return min([self._meminfo("MemTotal"), *(bound.limit_bytes for bound in bounds)])

    def _bounds(self) -> list[_Bound]:
        """Return the limits that this process' memory has; most groups set none."""
        bounds = []
        for folder, version in self._memory_groups():
            limit = _group_limit(folder, version)
            if limit is None:
                continue
            used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
            if used is not None:
                bounds.append(_Bound(folder, version, limit, limit - used + _reclaimable(folder, version)))
        return bounds

    def _memory_groups(self) -> list[tuple[Path, int]]:
        """Return the groups that bound this process' memory, looked up again only when it was moved."""
        now = _text(self._root / "proc/self/cgroup") or ""
        if now != self._found_for:
            self._found_for, self._found = now, list(self._groups("memory"))
        return self._found

    def cores(self) -> int:
        usable = self._physical_cores(os.sched_getaffinity(0))
        for folder, version in self._groups("cpu"):
            quota = _cpu_quota(folder, version)
            if quota is not None:
                # rounded down: threads that spin at barriers lose more by being stopped than by being fewer
                usable = min(usable, int(quota))
        return max(usable, 1)

    def _physical_cores(self, cpus: set[int]) -> int:
        topology = self._root / "sys/devices/system/cpu"
        cores = set()
        for cpu in cpus:
            siblings = _text(topology / f"cpu{cpu}/topology/thread_siblings_list")
            cores.add(siblings if siblings else str(cpu))
        return len(cores)

    def _meminfo(self, field: str) -> int:
        for line in (self._root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
        raise OSError(f"/proc/meminfo has no {field}")

    def _groups(self, controller: str) -> Iterator[tuple[Path, int]]:
        """Yield (folder, version) of every control group that bounds this process, from its own upwards."""
        for version, group in self._memberships(controller):
            for mount_root, mount_point in self._group_mounts(controller, version):
                inside = os.path.relpath(group, mount_root)
                # in a container the mount may show only a part of the tree, and not the part named in proc
                parts = () if inside == "." or inside.startswith("..") else Path(inside).parts
                top = self._root / mount_point.lstrip("/")
                for depth in range(len(parts), -1, -1):
                    yield top.joinpath(*parts[:depth]), version

    def _memberships(self, controller: str) -> Iterator[tuple[int, str]]:
        for line in (_text(self._root / "proc/self/cgroup") or "").splitlines():
            number, controllers, group = line.split(":", 2)
            if number == "0" and controllers == "":
                yield 2, group
            elif controller in controllers.split(","):
                yield 1, group

    def _group_mounts(self, controller: str, version: int) -> Iterator[tuple[str, str]]:
        for line in (_text(self._root / "proc/self/mountinfo") or "").splitlines():
            before, _, after = line.partition(" - ")
            _, _, _, mount_root, mount_point = before.split()[:5]
            kind, _, options = after.split()[:3]
            if (version == 2 and kind == "cgroup2") or (
                version == 1 and kind == "cgroup" and controller in options.split(",")
            ):
                yield mount_root, mount_point


class _Bound(NamedTuple):
    """A control group that limits memory, and what it has left."""

    folder: Path
    version: int
    limit_bytes: int
    spare_bytes: int


def _kib(status: bytes, field: bytes) -> int:
    at = status.find(field)
    return int(status[at + len(field) :].split(None, 1)[0]) * 1024 if at >= 0 else 0


def _text(path: Path) -> str | None:
    try:
        with open(path, "rb", buffering=0) as file:  # a third of the time of `read_text`: this is asked often
            return file.read().decode().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdigit() else None


def _group_limit(folder: Path, version: int) -> int | None:
    names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(folder / name)) is not None and limit < _UNLIMITED]
    return min(limits, default=None)


def _limit_hits(folder: Path, version: int) -> int:
    if version == 1:
        return _number(folder / "memory.failcnt") or 0
    events = dict(line.split() for line in (_text(folder / "memory.events") or "").splitlines())
    return int(events.get("high", 0)) + int(events.get("max", 0))


def _stalled(file: Path) -> float | None:
    """Return the share of ten seconds in which some task waited: "some avg10=1.50 avg60=…"."""
    for line in (_text(file) or "").splitlines():
        kind, average, *_ = line.split()
        if kind == "some":
            return float(average.removeprefix("avg10=")) / 100
    return None


def _reclaimable(folder: Path, version: int) -> int:
    stat = dict(line.split() for line in (_text(folder / "memory.stat") or "").splitlines())
    prefix = "" if version == 2 else "total_"
    inactive, active, slab = (
        int(stat.get(name, 0)) for name in (prefix + "inactive_file", prefix + "active_file", "slab_reclaimable")
    )
    # half of the active pages, as MemAvailable does: the others are programs and libraries in use
    return inactive + active // 2 + slab


def _cpu_quota(folder: Path, version: int) -> float | None:
    if version == 2:
        quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        return int(quota) / int(period or 100_000) if quota != "max" else None
    given, every = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return given / every if given and every else None
