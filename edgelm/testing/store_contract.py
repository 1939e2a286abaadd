"""What every store must do. The author of a store supplies `make_store` and inherits the suite.

Needs pytest; nothing in edgelm itself imports this module.
"""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.errors import ModelFileError
from edgelm.files.errors import TruncatedFile
from edgelm.memory.buffer import PAGE, Buffer
from edgelm.memory.stores import Store, span

CONTENTS = (random.Random(7).randbytes(3 * PAGE + 1234), random.Random(8).randbytes(64 * PAGE), b"x")
"""Three files: an odd end, an end on a block, and less than a block."""

LARGE = 4 << 20


class StoreContract:
    """Inherit and define `make_store`; every test here must then pass."""

    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        """Return the store under test over files with these contents; `folder` is empty and its own."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = self.make_store(CONTENTS, tmp_path)
        yield store
        store.close()

    def read(self, store: Store, file: int, offset: int, n_bytes: int) -> bytes:
        """Read one range, and check that the bytes lie where they must and nothing else is touched."""
        room = span(offset, n_bytes)
        with Buffer(room + 2 * PAGE) as buffer:
            buffer.view[:] = b"\xa5" * len(buffer.view)
            first = store.read_into(file, offset, n_bytes, buffer.view, PAGE)
            assert first == PAGE + offset % PAGE
            assert bytes(buffer.view[:PAGE]) == b"\xa5" * PAGE
            assert bytes(buffer.view[PAGE + room :]) == b"\xa5" * PAGE
            return bytes(buffer.view[first : first + n_bytes])

    @pytest.mark.parametrize("offset", [0, 1, 31, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 100])
    @pytest.mark.parametrize("n_bytes", [0, 1, 2, 1000, PAGE - 1, PAGE, PAGE + 1])
    def test_any_range_is_the_bytes_of_the_file(self, store: Store, offset: int, n_bytes: int) -> None:
        assert self.read(store, 0, offset, n_bytes) == CONTENTS[0][offset : offset + n_bytes]

    def test_random_ranges(self, store: Store) -> None:
        choose = random.Random(1)
        for _ in range(50):
            file = choose.randrange(len(CONTENTS))
            begin, end = sorted(choose.randrange(len(CONTENTS[file]) + 1) for _ in range(2))
            assert self.read(store, file, begin, end - begin) == CONTENTS[file][begin:end]

    @pytest.mark.parametrize("file", range(len(CONTENTS)))
    def test_whole_files_and_their_ends(self, store: Store, file: int) -> None:
        size = len(CONTENTS[file])
        assert self.read(store, file, 0, size) == CONTENTS[file]
        assert self.read(store, file, size - 1, 1) == CONTENTS[file][-1:]
        assert self.read(store, file, size, 0) == b""

    @pytest.mark.parametrize("file", range(len(CONTENTS)))
    @pytest.mark.parametrize("beyond", [1, PAGE, 1 << 40])
    def test_past_the_end_is_a_typed_error(self, store: Store, file: int, beyond: int) -> None:
        size = len(CONTENTS[file])
        with Buffer(4 * PAGE) as buffer:
            with pytest.raises(TruncatedFile, match="ends at"):
                store.read_into(file, size - 1, 2, buffer.view, 0)
            with pytest.raises(TruncatedFile, match="ends at"):
                store.read_into(file, size + beyond, 1, buffer.view, 0)

    def test_several_threads_at_once(self, store: Store) -> None:
        wrong: list[tuple[int, int]] = []

        def reader(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(40):
                begin, end = sorted(choose.randrange(len(CONTENTS[1]) + 1) for _ in range(2))
                if self.read(store, 1, begin, end - begin) != CONTENTS[1][begin:end]:
                    wrong.append((begin, end))

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_nothing_is_allocated_that_grows_with_the_size(self, tmp_path: Path) -> None:
        store = self.make_store((bytes(LARGE),), tmp_path)
        try:
            with Buffer(LARGE) as buffer:
                store.read_into(0, 0, LARGE, buffer.view, 0)
                tracemalloc.start()
                try:
                    store.read_into(0, 0, LARGE, buffer.view, 0)
                    _, peak = tracemalloc.get_traced_memory()
                finally:
                    tracemalloc.stop()
            assert peak < 64 << 10
        finally:
            store.close()

    def test_it_says_how_it_reads(self, store: Store) -> None:
        assert store.how

    def test_closing_twice_is_harmless(self, store: Store) -> None:
        store.close()
        store.close()


class FileStoreContract(StoreContract):
    """For stores over real files: define `open_paths` in place of `make_store`."""

    def open_paths(self, paths: list[Path]) -> Store:
        """Return the store under test over these files."""
        raise NotImplementedError

    def make_store(self, contents: tuple[bytes, ...], folder: Path) -> Store:
        paths = [folder / f"file-{number}" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        return self.open_paths(paths)

    def test_a_file_cut_short_after_opening_is_a_typed_error(self, store: Store, tmp_path: Path) -> None:
        with (tmp_path / "file-1").open("r+b") as file:
            file.truncate(10 * PAGE + 17)
        with Buffer(64 * PAGE) as buffer, pytest.raises(TruncatedFile, match=r"file-1: .*changed while it was open"):
            store.read_into(1, 0, 64 * PAGE, buffer.view, 0)

    def test_a_file_written_to_after_opening_is_a_typed_error(self, store: Store, tmp_path: Path) -> None:
        with (tmp_path / "file-1").open("r+b") as file:
            file.truncate(65 * PAGE)
        with Buffer(PAGE) as buffer, pytest.raises(ModelFileError, match="changed while it was open"):
            store.read_into(1, 0, PAGE, buffer.view, 0)

    def test_a_missing_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises((ModelFileError, OSError)):
            self.open_paths([tmp_path / "missing"])
