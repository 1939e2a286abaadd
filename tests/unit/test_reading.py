"""How a file system is read best is measured once, kept, refreshed, and not asked for in vain."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest

from edgelm.engine import reading
from edgelm.engine.reading import known, measure, read_pattern
from edgelm.memory.stores import CountingStore, open_store
from edgelm.sizes import MB, MIB

DAY_S = 86_400


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    for name in ("REFRESH_S", "QUICK_S", "THOROUGH_S"):
        monkeypatch.setattr(reading, name, 0.05)
    return tmp_path / "cache" / "rates"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(13 * MIB))
    return path


def model_file(path):
    tensors = {"first": SimpleNamespace(file=0, offset=1024)}
    return SimpleNamespace(paths=(path,), file_bytes=(path.stat().st_size,), tensors=tensors, main_part=0)


@pytest.fixture
def store(path):
    opened, _ = open_store([str(path)])
    yield CountingStore(opened)
    opened.close()


def n_reads(store, file, **options):
    """Return the pattern, and how many reads finding it took."""
    before = store.snapshot()
    pattern = read_pattern(store, file, 20 * MB, **options)
    return pattern, (store.snapshot() - before).n_reads


def change(cache, **facts):
    (kept,) = cache.glob("flash-*.json")
    kept.write_text(json.dumps(json.loads(kept.read_text()) | facts))


def test_a_pattern_is_measured_once(store, path):
    file = model_file(path)
    first, some = n_reads(store, file)
    assert some > 20
    assert first.bytes_per_s > 1 * MB
    assert first.how == store.how
    assert n_reads(store, file) == (first, 0)


def test_a_day_later_the_same_shape_is_measured_again(store, path, cache):
    file = model_file(path)
    first, _ = n_reads(store, file)
    change(cache, measured_at_s=time.time() - 2 * DAY_S)
    again, some = n_reads(store, file)
    assert some > 2
    assert again.bytes_per_s != first.bytes_per_s
    assert (again.block_bytes, again.n_parallel) == (first.block_bytes, first.n_parallel)
    assert n_reads(store, file) == (again, 0)


@pytest.mark.parametrize(
    "damage", [{"calibrated_at_s": time.time() - 31 * DAY_S}, {"pattern": 3}, {"table": [{}]}, {"measured_at_s": "now"}]
)
def test_old_and_damaged_patterns_are_measured_anew(store, path, cache, damage):
    file = model_file(path)
    read_pattern(store, file)
    change(cache, **damage)
    assert n_reads(store, file)[1] > 20
    assert n_reads(store, file)[1] == 0


def test_what_was_measured_thoroughly_is_used_by_the_next_model(store, path):
    assert known(path) is None
    n_reads(store, model_file(path))
    assert known(path) is None, "a quick measurement is no thorough one"
    found = measure(path)
    assert known(path) == found
    assert n_reads(store, model_file(path)) == (found.pattern, 0)


def test_direct_reads_are_compared_with_others(path):
    found = measure(path)
    if not found.pattern.direct:
        pytest.skip("direct reads are refused here")
    other = found.table[-1]
    assert not other.how.startswith("direct")
    assert (other.block_bytes, other.n_parallel) == (found.pattern.block_bytes, found.pattern.n_parallel)


def test_a_short_file_tells_nothing_about_the_device(tmp_path, cache):
    path = tmp_path / "short.gguf"
    path.write_bytes(bytes(MIB))
    store, _ = open_store([str(path)])
    assert read_pattern(store, model_file(path)).bytes_per_s > 0
    store.close()
    assert not list(cache.glob("*"))


def test_a_cache_that_cannot_be_written(store, path, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file" / "below"))
    assert read_pattern(store, model_file(path)).bytes_per_s > 0
