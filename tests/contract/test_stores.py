"""Every store of edgelm against the contract that strangers' stores inherit."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm.memory.stores import (
    BufferedStore,
    CountingStore,
    DirectStore,
    DontCacheStore,
    MemoryStore,
    Store,
    ThrottledStore,
    open_store,
)
from edgelm.sizes import GB
from edgelm.testing.store_contract import FileStoreContract, StoreContract


class TestMemoryStore(StoreContract):
    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        return MemoryStore(contents)


class TestCountingStore(StoreContract):
    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        return CountingStore(MemoryStore(contents))


class TestThrottledStore(StoreContract):
    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        return ThrottledStore(MemoryStore(contents), bytes_per_s=10 * GB, latency_s=1e-5)


class TestBufferedStore(FileStoreContract):
    def open_paths(self, paths: list[Path]) -> Store:
        return BufferedStore([str(path) for path in paths])


class TestDirectStore(FileStoreContract):
    def open_paths(self, paths: list[Path]) -> Store:
        return _or_skip(DirectStore, paths)


class TestDontCacheStore(FileStoreContract):
    def open_paths(self, paths: list[Path]) -> Store:
        return _or_skip(DontCacheStore, paths)


class TestOpenedStore(FileStoreContract):
    def open_paths(self, paths: list[Path]) -> Store:
        return open_store([str(path) for path in paths])[0]


def _or_skip(kind: type[DirectStore | DontCacheStore], paths: list[Path]) -> Store:
    try:
        return kind([str(path) for path in paths])
    except FileNotFoundError:
        raise
    except OSError as exc:
        pytest.skip(f"this file system has no {kind.__name__}: {exc}")
