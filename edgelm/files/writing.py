"""Write large files as a whole or not at all: under a name of their own first, renamed when they are on the disk."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""The end of the name of a file that is not complete yet; before it stands the process that writes it."""


@contextlib.contextmanager
def whole_or_nothing(target: Path, private: bool = False) -> Iterator[BinaryIO]:
    """Give a file to write that gets its name when it is complete and on the disk, or vanishes.

    `private`: only its owner can read it, where the system knows such a thing.
    """
    partial = target.with_name(f"{target.name}.{os.getpid()}{PARTIAL}")
    mode = 0o600 if private else 0o666
    try:
        with open(partial, "xb", opener=lambda path, flags: os.open(path, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    _sync_folder(target.absolute().parent)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what processes that are gone left half-written in a folder, of one file or of any."""
    for path in folder.glob(f"{glob.escape(name) if name else '*'}.*{PARTIAL}"):
        pid = path.name.removesuffix(PARTIAL).rpartition(".")[2]
        if pid.isdigit() and not _runs(int(pid)):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Say whether there is a process of this number."""
    if os.name != "posix":  # where a signal of 0 would end it
        import psutil

        return psutil.pid_exists(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def free_bytes(folder: Path) -> int:
    """Return the room that this user has left on the disk of a folder."""
    return shutil.disk_usage(folder).free


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk, where folders can be synced."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(fd)
