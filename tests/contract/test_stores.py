"""Every store of edgelm against the contract that strangers' stores inherit."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from edgelm.files.ggml_types import TensorType
from edgelm.files.model import Checksums, Derived, ModelFile, TensorInfo
from edgelm.memory.derived import derived
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
from edgelm.memory.verified import VerifiedStore
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


class TestDerivedStore(StoreContract):
    """Over a first file that stands nowhere: a given tensor, and one that is copied from a file behind the others."""

    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        content, cut = contents[0], 1501
        at, last = len(content) - cut, len(contents)
        given = TensorInfo("given", TensorType.I8, (cut,), 0, 0, cut)
        copied = TensorInfo("copied", TensorType.I8, (at,), 0, cut, at)
        source = TensorInfo("source", TensorType.I8, (at,), last, cut, at)
        model = ModelFile(
            (folder,) * (last + 1),
            {},
            {"given": given, "copied": copied},
            "",
            0,
            (len(content),),
            "",
            derived={
                "given": Derived(given, "given", content=content[:cut]),
                "copied": Derived(copied, "copy", (source,)),
            },
        )
        return derived(MemoryStore([b"", *contents[1:], content]), model)


class TestVerifiedStore(StoreContract):
    """Over a first file that is a tensor of many tiles, and others that have no checksums."""

    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        content = contents[0]
        info = TensorInfo("tensor", TensorType.I8, (1, len(content)), 0, 0, len(content), row_step=1000)
        sums = array("Q", (xxh3_64_intdigest(content[at : at + 1000]) for at in range(0, len(content), 1000)))
        checksums = (Checksums(0, (info,), memoryview(sums.tobytes())),)
        file = ModelFile((folder,), {}, {"tensor": info}, "llama", 0, (len(content),), "", checksums=checksums)
        return VerifiedStore(MemoryStore(contents), file)


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
