"""Keep built tables on disk, one file per model, and map them read-only.

A file is written whole or not at all, and checked before it is used. A folder that cannot be written costs the
second start its speed, nothing else. Knows files; knows nothing of what is in the tables.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from edgelm.cachedir import cache_dir
from edgelm.text.tables import FORMAT, HEAD_BYTES, BadTables, Tables, checked_head, crc32_of

_STEP_BYTES = 1 << 16


def default_folder() -> Path:
    """Return the folder of tables: under `$EDGELM_CACHE`, else under the user's cache folder."""
    return cache_dir() / "tokenizers"


def path_of(key: str, folder: Path | None = None) -> Path:
    """Return where the tables of `key` are kept."""
    return (folder or default_folder()) / f"{re.sub('[^0-9a-zA-Z]', '_', key)}-{FORMAT}.tables"


def cached_tables(key: str, build: Callable[[], list[bytes]], folder: Path | None) -> Tables:
    """Return the tables of `key` from `folder` (None: the default), building and keeping them if need be."""
    path = path_of(key, folder)
    try:
        return _map(path)
    except (OSError, BadTables):
        chunks = build()
    try:
        _write(path, chunks)
        return _map(path)
    except (OSError, BadTables):  # full, read-only, or a file system without mmap
        return Tables(b"".join(chunks))


def _map(path: Path) -> Tables:
    with path.open("rb", buffering=0) as file:
        n_bytes = os.fstat(file.fileno()).st_size
        crc = checked_head(file.read(HEAD_BYTES), n_bytes)
        # Read, not mapped: checking must not make all of it resident.
        if crc32_of(iter(lambda: file.read(_STEP_BYTES), b"")) != crc:
            raise BadTables("damaged")
        tables = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
        tables[:: mmap.PAGESIZE]  # every page, now: memory is measured before a long prompt would touch them all
        return Tables(tables)


def _write(path: Path, chunks: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: importing it costs a megabyte. The name is this process's own.
    name = path.with_suffix(f".{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with name.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
