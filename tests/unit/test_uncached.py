"""Files that a library reads itself leave the page cache as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.memory.platform import current_platform
from edgelm.memory.uncached import uncached

N_BYTES = 8 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    with path.open("wb") as out:
        out.write(os.urandom(N_BYTES))
        out.flush()
        os.fsync(out.fileno())
    return path


@pytest.fixture
def cached(file: Path) -> Iterator[object]:
    """Return a function that says how much of the file is cached; skip where the system does not tell."""
    system = current_platform()
    handle = system.open_buffered(str(file))
    file.read_bytes()
    if not system.cached_bytes(handle, 0, N_BYTES):
        pytest.skip("this system does not tell what is in its page cache")
    system.drop_cache(handle)
    if system.cached_bytes(handle, 0, N_BYTES):
        pytest.skip("this file system keeps its files in memory")
    yield lambda: system.cached_bytes(handle, 0, N_BYTES)
    system.close(handle)


def test_what_was_not_cached_is_not_cached_afterwards(file: Path, cached: object) -> None:
    assert callable(cached)
    with uncached([file]):
        file.read_bytes()
    assert cached() == 0


def test_what_was_cached_stays_also_after_an_error(file: Path, cached: object) -> None:
    assert callable(cached)
    file.read_bytes()
    with pytest.raises(ZeroDivisionError), uncached([file]):
        raise ZeroDivisionError
    assert cached() == N_BYTES


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), uncached([tmp_path / "nothing"]):
        pass
