"""A cache whose oldest blocks lie on flash holds what was stored, whatever is forgotten on the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.memory.arena import LayerCache
from edgelm.memory.buffer import Buffer
from edgelm.memory.platform import current_platform
from edgelm.memory.scratch import ScratchError, ScratchFile
from edgelm.memory.spill import SpilledCache
from edgelm.memory.spill_shape import PLACES, SpillShape, least_blocks
from edgelm.memory.stores import CountingStore, Store
from edgelm.memory.timeline import Times

LAYERS = ((1, LayerCache(0, 0, 2, 8, 4)), (3, LayerCache(0, 0, 1, 16, 16)))
CONTEXT, CHUNK = 9 * PLACES, 300


def rows(layer: int, versions: np.ndarray, first: int, dim: int, n_heads: int) -> np.ndarray:
    """Numbers that say of which layer, position and time of writing they are."""
    n = len(versions)
    head = np.arange(n_heads)[None, :, None] * 4 + layer
    at = np.arange(first, first + n)[:, None, None]
    return np.broadcast_to(at % 1024 + head / 16 + versions[:, None, None] * 2, (n, n_heads, dim)).astype(np.float32)


class Kept:
    """The cache beside what it should hold."""

    def __init__(self, folder: Path, n_blocks: int) -> None:
        self.shape = SpillShape(LAYERS, CONTEXT, n_blocks)
        file = ScratchFile(folder, self.shape.file_bytes)
        self.reads = CountingStore(file)
        self.cache = SpilledCache(self.shape, file, self.reads, Times())
        self.versions, self.n_past, self.time = np.zeros(CONTEXT, np.int64), 0, 0

    def write(self, n: int) -> None:
        self.time += 1
        self.cache.begin(self.n_past, n)
        self.versions[self.n_past : self.n_past + n] = self.time % 400
        new = self.versions[self.n_past : self.n_past + n]
        for layer, facts in LAYERS:
            dims = (facts.head_dim_k, facts.head_dim_v)
            keys, values = (rows(layer, new, self.n_past, dim, facts.n_kv_heads) for dim in dims)
            self.cache.store(layer, keys, values)
            self.check(layer, facts, self.n_past + n)
        self.n_past += n

    def check(self, layer: int, facts: LayerCache, end: int) -> None:
        expected = 0
        for blocks in self.cache.blocks(layer):
            assert blocks.first == expected
            for keys, values in zip(blocks.keys, blocks.values, strict=True):
                start = expected * PLACES
                n = min(PLACES, end - start)
                for found, dim in ((keys, facts.head_dim_k), (values, facts.head_dim_v)):
                    wanted = rows(layer, self.versions[start : start + n], start, dim, facts.n_kv_heads)
                    assert np.array_equal(found[:, :n].transpose(1, 0, 2), wanted.astype(np.float16))
                expected += 1
            self.cache.release(blocks)
        assert expected == -(-end // PLACES)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(st.integers(0, 100), st.integers(1, CHUNK)), min_size=3, max_size=16),
    n_blocks=st.integers(least_blocks(CHUNK), 5),
)
def test_holds_what_was_stored(tmp_path: Path, steps: list[tuple[int, int]], n_blocks: int) -> None:
    """Each step forgets some share of the positions, or nothing, and appends up to a chunk."""
    kept = Kept(tmp_path, n_blocks)
    try:
        for share, n in [(0, CHUNK)] * 4 + steps:
            if share > 80:
                kept.n_past = kept.n_past * (100 - share) // 20
            if kept.n_past + n > CONTEXT:
                kept.n_past = kept.n_past // 2
            kept.write(n)
    finally:
        kept.cache.close()


def test_a_block_is_written_once_and_read_in_large_pieces(tmp_path: Path) -> None:
    kept = Kept(tmp_path, least_blocks(CHUNK))
    for _ in range(7):
        kept.write(PLACES)
    spilled = 7 - kept.shape.n_blocks
    assert kept.cache.traffic.written_bytes == spilled * kept.shape.step_bytes
    before = kept.reads.snapshot()
    kept.write(1)
    reads = kept.reads.snapshot() - before
    now_spilled = spilled + 1  # the new position began a block
    assert kept.cache.traffic.written_bytes == now_spilled * kept.shape.step_bytes
    assert reads.read_bytes == now_spilled * kept.shape.step_bytes
    assert reads.n_reads == len(LAYERS) * -(-now_spilled // 4)
    kept.n_past = PLACES  # back to the first block, which was written before and is not written again
    kept.write(CHUNK)
    assert kept.cache.traffic.written_bytes == now_spilled * kept.shape.step_bytes
    kept.cache.close()


def test_a_pass_that_is_broken_off_leaves_nothing_behind(tmp_path: Path) -> None:
    kept = Kept(tmp_path, least_blocks(CHUNK))
    for _ in range(7):
        kept.write(PLACES)
    kept.cache.begin(kept.n_past, 5)
    next(kept.cache.blocks(1))  # held, never released
    kept.cache.reset()
    kept.write(5)
    kept.cache.close()


class Failing:
    """Reads fail after the first ones."""

    how = "fails"

    def __init__(self, inner: Store, n_good: int) -> None:
        self._inner, self._n = inner, n_good

    def read_into(self, *args: object) -> int:
        self._n -= 1
        if self._n < 0:
            raise ScratchError("the drive is gone; check it")
        return self._inner.read_into(*args)  # type: ignore[arg-type]

    def close(self) -> None:
        self._inner.close()


def test_a_failing_read_is_raised_where_it_is_needed(tmp_path: Path) -> None:
    shape = SpillShape(LAYERS, CONTEXT, 3)
    file = ScratchFile(tmp_path, shape.file_bytes)
    cache = SpilledCache(shape, file, Failing(file, 1), Times())
    zeros = np.zeros((PLACES, 2, 16), np.float32)

    def fill() -> None:
        for i in range(9):
            cache.begin(i * PLACES, PLACES)
            for layer, facts in LAYERS:
                keys, values = (zeros[:, : facts.n_kv_heads, :dim] for dim in (facts.head_dim_k, facts.head_dim_v))
                cache.store(layer, keys, values)
                for blocks in cache.blocks(layer):
                    cache.release(blocks)

    with pytest.raises(ScratchError, match="the drive is gone"):
        fill()
    cache.close()


def test_the_file_has_no_name_and_gives_its_bytes_back(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path / "new", 1 << 20)
    assert list((tmp_path / "new").iterdir()) == []
    with Buffer(8192) as ours:
        ours.view[:] = bytes(range(256)) * 32
        file.write(16384, ours.view)
        with Buffer(16384) as other:
            assert file.read_into(0, 16384, 8192, other.view, 4096) == 4096
            assert other.view[4096:12288] == ours.view
    file.close()
    file.close()


def test_a_drive_with_too_little_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=70_000_000))
    ScratchFile(tmp_path, 4_000_000).close()
    with pytest.raises(ScratchError, match=r"has 70 MB free; .* 8 MB .*EDGELM_CACHE"):
        ScratchFile(tmp_path, 8_000_000)


def test_a_folder_that_cannot_hold_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ScratchError, match="cannot hold keys and values"):
        ScratchFile(tmp_path / "file", 4096)
    system = current_platform()

    def refuse(path: str, n_bytes: int) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(system, "open_scratch", refuse, raising=True)
    with pytest.raises(ScratchError, match="Invalid argument"):
        ScratchFile(tmp_path, 4096, system)
