"""The way to read the flash that a file lies on: calibrated once for each file system, and kept on disk.

What reads best is a property of the device and is believed for a month; how fast it is changes, and is believed for
a day. Measuring itself is `memory.flash`'s.
"""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.calibration import KEPT_S, LIMIT_BYTES
from edgelm.engine.machine import digest, machine_key
from edgelm.files.model import ModelFile
from edgelm.memory.flash import (
    QUICK_S,
    REFRESH_S,
    THOROUGH_S,
    Calibration,
    ReadPattern,
    Shape,
    Stretch,
    Turn,
    calibrate,
)
from edgelm.memory.platform import current_platform
from edgelm.memory.stores import Store, open_store

SHAPE_KEPT_S = 30 * KEPT_S


def read_pattern(store: Store, file: ModelFile, limit_bytes: int = LIMIT_BYTES) -> ReadPattern:
    """Return how to read this model from its flash, and how fast that is.

    Takes a millisecond if it is known, 0.1 s once a day, 0.4 s the first time on a file system (longer if a few MB
    take longer), and at most half of `limit_bytes`.
    """
    number = file.main_part
    start = min(info.offset for info in file.tensors.values() if info.file == number)
    stretch = Stretch(number, file.file_bytes[number] - start, start)
    kept = _Kept(store, file.paths[number])
    if kept.calibration is None:
        found = calibrate(store, stretch, limit_bytes=limit_bytes, seconds=QUICK_S)
        return kept.keep(found, stretch, thorough=False).pattern
    if kept.is_old:
        pattern = kept.calibration.pattern
        shape = Shape(pattern.block_bytes, pattern.n_parallel)
        again = calibrate(store, stretch, limit_bytes=limit_bytes, seconds=REFRESH_S, shapes=(shape,))
        kept.refresh(again.pattern, stretch)
        return again.pattern
    return kept.calibration.pattern


def known(path: Path) -> Calibration | None:
    """Return what was measured in the last day of the flash that this file lies on. Raises `ModelFileError`."""
    store, _ = open_store([str(path)])
    store.close()
    kept = _Kept(store, path)
    return kept.calibration if kept.thorough and not kept.is_old else None


def measure(path: Path) -> Calibration:
    """Measure the flash that this file lies on, for about 3 s, and keep what was found. Raises `ModelFileError`.

    Where direct reads work, the best pattern is measured without them, too.
    """
    store, _ = open_store([str(path)])
    try:
        stretch = Stretch(0, path.stat().st_size)
        found = calibrate(store, stretch, limit_bytes=LIMIT_BYTES, seconds=THOROUGH_S)
    finally:
        store.close()
    if found.pattern.direct:
        found = replace(found, table=(*found.table, *_not_direct(path, stretch, found.pattern)))
    return _Kept(store, path).keep(found, stretch, thorough=True)


def _not_direct(path: Path, stretch: Stretch, pattern: ReadPattern) -> tuple[Turn, ...]:
    system = current_platform()
    handle = system.open_buffered(str(path))
    try:
        system.drop_cache(handle)  # else memory would be measured
    finally:
        system.close(handle)
    store, _ = open_store([str(path)], direct=False)
    try:
        shape = Shape(pattern.block_bytes, pattern.n_parallel)
        return calibrate(store, stretch, limit_bytes=LIMIT_BYTES, seconds=QUICK_S, shapes=(shape,)).table
    finally:
        store.close()


class _Kept:
    """What is on disk about a file system and a way of reading. `calibration` is None if there is nothing."""

    def __init__(self, store: Store, path: Path) -> None:
        self._path = cache_dir() / "rates" / f"flash-{digest(store.how, _file_system(path), machine_key())}.json"
        self._said: dict[str, Any] = read_json(self._path) or {}
        self.calibration: Calibration | None = None
        self.thorough = self.is_old = False
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # a file of another make
            now = time.time()
            if 0 <= now - float(self._said["calibrated_at_s"]) < SHAPE_KEPT_S:
                self.is_old = not 0 <= now - float(self._said["measured_at_s"]) < KEPT_S
                self.thorough = bool(self._said["thorough"])
                table = tuple(Turn(**turn) for turn in self._said["table"])
                self.calibration = Calibration(ReadPattern(**self._said["pattern"]), table)

    def keep(self, found: Calibration, stretch: Stretch, *, thorough: bool) -> Calibration:
        """Note `found`, if the stretch says something about the device, and return it."""
        if stretch.tells:
            now = time.time()
            said = {"calibrated_at_s": now, "measured_at_s": now, "thorough": thorough, **asdict(found)}
            write_json(self._path, said)
        return found

    def refresh(self, pattern: ReadPattern, stretch: Stretch) -> None:
        """Note new figures of the pattern that is known."""
        if stretch.tells:
            write_json(self._path, self._said | {"measured_at_s": time.time(), "pattern": asdict(pattern)})


def _file_system(path: Path) -> str:
    """Return what tells one file system of one device under one kernel from others."""
    with suppress(OSError):
        facts = [os.stat(path).st_dev, platform.release()]
        if hasattr(os, "statvfs"):
            # its own number, made when it was: device numbers change places, and a new format has another speed
            facts.append(os.statvfs(path).f_fsid)
        return " ".join(map(str, facts))
    return str(path)  # a store of its own kind, with files that the system does not know
