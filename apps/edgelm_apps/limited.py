"""Run a command in a memory cgroup (v1 or v2), page cache included, and say what it used.

Knows control groups and the page cache; knows nothing of models. Needs root and a writable memory controller.

    python -m edgelm_apps.limited 150MB [--evict FILE | --cold] COMMAND [ARG ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edgelm.sizes import parse_size

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
# the child puts itself into the group and becomes the command: nothing of this process is charged to it
_ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class NoCgroup(OSError):
    """This machine lets us make no memory cgroup."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Counters of a group or a process while it runs."""

    major_faults: int
    refaults: int
    usage_bytes: int


@dataclass(frozen=True, slots=True)
class Limited:
    """What a command did inside its limit. `peak_bytes` cannot pass the limit: hits and kills say whether it was felt.

    `refaults` counts file pages that were evicted and read again, where the kernel tells it.
    """

    limit_bytes: int
    peak_bytes: int
    limit_hits: int
    oom_kills: int
    major_faults: int
    refaults: int
    exit_code: int
    wall_s: float
    stdout: str
    stderr: str

    def as_dict(self) -> dict[str, int | float]:
        return {key: value for key, value in asdict(self).items() if key not in ("stdout", "stderr")}


class Group:
    """One memory cgroup without swap."""

    def __init__(self, limit_bytes: int) -> None:
        name = f"edgelm-bench-{os.getpid()}-{time.monotonic_ns()}"
        self.limit_bytes = limit_bytes
        self.version = 1 if (_V1 / "memory.limit_in_bytes").exists() else 2
        self.folder = (_V1 if self.version == 1 else _V2) / name
        try:
            self.folder.mkdir()
        except OSError as error:
            raise NoCgroup(f"no writable memory cgroup here: {error}") from error
        try:
            limit, swap = ("memory.limit_in_bytes", "memory.swappiness")
            if self.version == 2:
                limit, swap = "memory.max", "memory.swap.max"
            (self.folder / limit).write_text(str(limit_bytes))
            with suppress(OSError):  # a kernel without swap has no such file
                (self.folder / swap).write_text("0")
        except OSError as error:
            self.folder.rmdir()
            raise NoCgroup(f"the memory controller is not ours to use: {error}") from error

    def command(self, argv: Sequence[str]) -> list[str]:
        """Return the command line that runs `argv` inside the group."""
        return ["/bin/sh", "-c", _ENTER, str(self.folder), *argv]

    def sample(self) -> Sample:
        usage = self._number("memory.usage_in_bytes" if self.version == 1 else "memory.current")
        return Sample(self._stat("pgmajfault"), self._refaults(), usage)

    @property
    def peak_bytes(self) -> int:
        return self._number("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")

    @property
    def limit_hits(self) -> int:
        return self._number("memory.failcnt") if self.version == 1 else self._field("memory.events", "max")

    @property
    def oom_kills(self) -> int:
        return self._field("memory.oom_control" if self.version == 1 else "memory.events", "oom_kill")

    def remove(self) -> None:
        for _ in range(20):
            try:
                self.folder.rmdir()
                return
            except OSError:  # pages of the last process are still being given back
                time.sleep(0.05)

    def _refaults(self) -> int:
        return self._stat("workingset_refault_file") or self._stat("workingset_refault")

    def _stat(self, key: str) -> int:
        return self._field("memory.stat", f"total_{key}" if self.version == 1 else key)

    def _number(self, file: str) -> int:
        try:
            return int((self.folder / file).read_text())
        except (OSError, ValueError):
            return 0

    def _field(self, file: str, key: str) -> int:
        try:
            pairs = (line.split() for line in (self.folder / file).read_text().splitlines())
            return next((int(value) for name, value in pairs if name == key), 0)
        except OSError:
            return 0


@contextmanager
def group(limit_bytes: int) -> Iterator[Group]:
    """Make a memory cgroup for the block. Raises `NoCgroup`."""
    made = Group(limit_bytes)
    try:
        yield made
    finally:
        made.remove()


def run(
    argv: Sequence[str], limit_bytes: int, *, env: Mapping[str, str] | None = None, timeout_s: float = 1800
) -> Limited:
    """Run `argv` inside a group of `limit_bytes`. Raises `NoCgroup`; a failing command does not raise."""
    with group(limit_bytes) as made:
        began = time.perf_counter()
        done = subprocess.run(
            made.command(argv), env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )
        wall_s = time.perf_counter() - began
        last = made.sample()
        return Limited(
            limit_bytes, made.peak_bytes, made.limit_hits, made.oom_kills, last.major_faults, last.refaults,
            done.returncode, wall_s, done.stdout, done.stderr,
        )  # fmt: skip


def evict(path: str | os.PathLike[str]) -> None:
    """Drop one file from the page cache: libraries stay warm, the model is cold."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def evict_everything() -> None:
    """Drop the whole page cache. Raises `PermissionError` without root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main(argv: list[str]) -> int:
    limit_bytes, rest = parse_size(argv[0]), argv[1:]
    if rest[0] == "--cold":
        evict_everything()
        rest = rest[1:]
    elif rest[0] == "--evict":
        evict(rest[1])
        rest = rest[2:]
    result = run(rest, limit_bytes)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    print(json.dumps(result.as_dict()), file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
