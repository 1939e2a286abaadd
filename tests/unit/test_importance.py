"""Places that layers share out, and the memory that never holds more than its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgelm.engine.importance import sizes_of
from edgelm.memory.arena import LayerCache
from edgelm.memory.bounded import BoundedCache, bounded_bytes

N, N_LAYERS, LEAST = 200, 5, 9
LAYER = LayerCache(0, 0, 2, 8, 4)


def ranks(seed: int) -> list[np.ndarray]:
    """Layers from those that look at a few places to those that look at all of them."""
    random = np.random.default_rng(seed)
    return [random.random(N).astype(np.float32) ** power for power in (40, 10, 4, 1, 0.2)]


@example(seed=0, total=937)  # most places of a layer have no attention worth mentioning
@given(seed=st.integers(0, 50), total=st.integers(LEAST * N_LAYERS, N * N_LAYERS))
def test_the_total_is_kept_and_used(seed: int, total: int) -> None:
    sizes = sizes_of(ranks(seed), total, LEAST)
    assert sum(sizes) == total
    assert all(LEAST <= size <= N for size in sizes)


@given(seed=st.integers(0, 50), total=st.integers(LEAST * N_LAYERS, N * N_LAYERS - 1))
def test_more_room_is_less_for_nobody(seed: int, total: int) -> None:
    found = ranks(seed)
    assert all(a <= b for a, b in zip(sizes_of(found, total, LEAST), sizes_of(found, total + 1, LEAST), strict=True))


def test_layers_that_look_at_few_places_get_few() -> None:
    sizes = sizes_of(ranks(1), N * N_LAYERS // 4, LEAST)
    assert sizes == sorted(sizes)
    assert sizes[0] < N // 10 < N // 3 < sizes[-1]


def test_all_or_too_little() -> None:
    assert sizes_of(ranks(1), N * N_LAYERS, LEAST) == [N] * N_LAYERS
    with pytest.raises(ValueError, match="too few for 9 in each of 5"):
        sizes_of(ranks(1), LEAST * N_LAYERS - 1, LEAST)


def test_layers_that_look_alike_get_the_same() -> None:
    flat = [np.ones(N, np.float32)] * N_LAYERS
    sizes = sizes_of(flat, 500, LEAST)
    assert sizes == [100] * N_LAYERS


def rows(first: int, n: int, dim: int) -> np.ndarray:
    return np.broadcast_to(np.arange(first, first + n, dtype=np.float32)[None, :, None], (2, n, dim))


def test_a_bounded_cache_holds_what_was_chosen_and_what_came_after() -> None:
    cache = BoundedCache(LAYER, 20)
    assert bounded_bytes(LAYER, 20) == 4096
    for first in (0, 10):
        cache.append(rows(first, 10, 8), rows(first, 10, 4))
    assert (cache.n, cache.end) == (20, 20)
    with pytest.raises(AssertionError):
        cache.append(rows(20, 1, 8), rows(20, 1, 4))
    cache.keep(np.array([0, 3, 19]))
    cache.append(rows(20, 2, 8), rows(20, 2, 4))
    assert cache.keys[0, :, 0].tolist() == [0, 3, 19, 20, 21]
    assert cache.values[1, :, 3].tolist() == [0, 3, 19, 20, 21]
    cache.go_back(21)
    cache.go_back(22)  # nothing comes back
    assert (cache.n, cache.end) == (4, 21)
    assert cache.keys[0, :, 0].tolist() == [0, 3, 19, 20]
    cache.close()
