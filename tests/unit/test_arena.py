"""The KV cache: places, masks and rollbacks against a plain list of what every place holds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.memory.arena import LENGTH_STEP, PLACE_STEP, KVArena, LayerCache, cache_bytes, capacity
from edgelm.memory.cache_layout import CacheLayout

FULL, RING = 0, 1


def arena_of(window: int, context: int, chunk: int) -> KVArena:
    layers = [LayerCache(FULL, 0, 2, 8, 4), LayerCache(RING, window, 1, 16, 16), LayerCache(FULL, 0, 2, 8, 4)]
    return KVArena(layers, context, chunk)


class Naive:
    """What was written where: position by place, for one group."""

    def __init__(self, window: int, n_places: int) -> None:
        self.window, self.places = window, [-1] * n_places

    def write(self, places: list[int], positions: list[int]) -> None:
        for place, position in zip(places, positions, strict=True):
            self.places[place] = position

    def visible(self, position: int) -> set[int]:
        first = position - self.window + 1 if self.window else 0
        return set(range(max(first, 0), position + 1))


def claim(arena: KVArena, naive: dict[int, Naive], n_tokens: int) -> None:
    """Claim a pass and check places and masks of both groups."""
    positions = list(range(arena.n_past, arena.n_past + n_tokens))
    for group, reference in naive.items():
        length = arena.length(group, n_tokens)
        places, mask = np.zeros(n_tokens, np.int64), np.full((n_tokens, length), 7.0, np.float32)
        arena.claim(group, n_tokens, places, mask)
        assert len(set(places.tolist())) == n_tokens
        assert places.max() < length <= arena.most_places(group)
        reference.write(places.tolist(), positions)
        for position, row in zip(positions, mask, strict=True):
            assert set(row.tolist()) <= {0.0, -np.inf}
            seen = [reference.places[place] for place in np.flatnonzero(row == 0)]
            assert sorted(seen) == sorted(reference.visible(position)), (group, position)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(32, 300),
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from(["pass", "pass", "cancel", "truncate"]), st.floats(0, 1)), max_size=40),
)
def test_masks_show_exactly_what_a_position_may_see(
    window: int, context: int, chunk: int, steps: list[tuple[str, float]]
) -> None:
    arena = arena_of(window, context, chunk)
    naive = {FULL: Naive(0, arena.most_places(FULL)), RING: Naive(window, arena.most_places(RING))}
    for step, share in steps:
        n_tokens = min(1 + int(share * (chunk - 1)), context - arena.n_past)
        if step == "truncate":
            asked = int(share * (arena.n_past + 3))
            before, kept = arena.n_past, arena.truncate(asked)
            assert kept == arena.n_past
            assert kept in (0, min(asked, before))
            if kept == 0 and min(asked, before) > 0:  # only because the ring has lost something
                ring = naive[RING].places
                needed = range(max(min(asked, before) - window + 1, 0), min(asked, before))
                assert any(position not in ring for position in needed)
        elif n_tokens > 0:
            claim(arena, naive, n_tokens)
            if step == "cancel":
                n_past = arena.n_past
                assert arena.truncate(n_past) == n_past, "a pass that is broken off costs nothing that is stored"
            else:
                arena.advance(n_tokens)
    arena.close()


def test_a_ring_holds_its_window_and_the_widest_pass() -> None:
    assert capacity(0, 4096, 512) == 4096
    assert capacity(512, 4096, 512) == 1024
    assert capacity(512, 4096, 1) == 544
    assert capacity(512, 300, 512) == 320
    assert capacity(0, 17, 1) == PLACE_STEP


def test_length_grows_in_steps_up_to_the_capacity() -> None:
    arena = arena_of(100, 1000, 28)
    assert [arena.length(FULL, 1), arena.length(RING, 1)] == [LENGTH_STEP, 128]
    arena.advance(256)
    assert [arena.length(FULL, 1), arena.length(RING, 1)] == [2 * LENGTH_STEP, 128]
    arena.advance(700)
    assert arena.length(FULL, 44) == 1000 + 24 == arena.most_places(FULL)
    arena.close()


def test_layers_share_the_buffer_without_overlap() -> None:
    layers = [LayerCache(FULL, 0, 2, 8, 4), LayerCache(RING, 16, 1, 16, 24)]
    arena = KVArena(layers, 64, 16)
    sizes = [2 * 64 * 2 * 8, 2 * 64 * 2 * 4, 2 * 32 * 16, 2 * 32 * 24]
    starts = [arena.keys[0], arena.values[0], arena.keys[1], arena.values[1]]
    assert [b - a for a, b in pairwise(starts)] == sizes[:3]
    assert arena.n_bytes == sum(sizes) == cache_bytes(layers, 64, 16)
    arena.close()


def test_a_ring_that_has_gone_on_cannot_come_back() -> None:
    arena = arena_of(16, 300, 8)
    places, mask = np.zeros(8, np.int64), np.zeros((8, 300), np.float32)
    for _ in range(20):
        for group in (FULL, RING):
            arena.claim(group, 8, places, mask[:, : arena.length(group, 8)])
        arena.advance(8)
    assert arena.truncate(155) == 155
    assert arena.truncate(152) == 152
    assert arena.truncate(100) == 0
    assert arena.n_past == 0
    arena.close()


LAYOUTS = [
    CacheLayout(item, values, rings)
    for item in ("f16", "f32")
    for values in ("dim_place", "place_dim")
    for rings in (True, False)
]


def filled(layout: CacheLayout, n_past: int, window: int = 20, context: int = 200, chunk: int = 12) -> KVArena:
    """A cache whose every number says which layer, head, dimension and position it is of."""
    layers = [LayerCache(FULL, 0, 2, 8, 4), LayerCache(RING, window, 1, 6, 10)]
    arena = KVArena(layers, context, chunk, layout)
    places = np.zeros(chunk, np.int64)
    while arena.n_past < n_past:
        n = min(chunk, n_past - arena.n_past)
        for group in (FULL, RING):
            arena.claim(group, n, places[:n], np.zeros((n, arena.length(group, n)), np.float32))
        first = arena.n_past
        arena.advance(n)
        for layer, facts in enumerate(layers):
            shapes = ((n, facts.n_kv_heads, facts.head_dim_k), (n, facts.n_kv_heads, facts.head_dim_v))
            keys, values = (
                np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + layer * 100 + kind * 1000 + first
                for kind, shape in enumerate(shapes)
            )
            arena.import_(layer, first, keys, values)
    return arena


@pytest.mark.parametrize("target", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_what_is_stored_can_be_handed_over_to_any_layout(source: CacheLayout, target: CacheLayout) -> None:
    for n_past in (0, 5, 150):
        first, second = filled(source, n_past), filled(target, 40, context=180, chunk=30)
        second.copy_from(first)
        assert second.n_past == n_past
        for layer in range(2):
            held = second.held(layer)
            # all that the next token must see, and no more than the source knew
            assert len(held) >= min(n_past, 19) if layer else len(held) == n_past
            assert set(held) <= set(first.held(layer))
            if n_past:
                ours, theirs = (one.export(layer, int(held[0]), len(held)) for one in (second, first))
                assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        naive = {FULL: Naive(0, second.most_places(FULL)), RING: Naive(20, second.most_places(RING))}
        for layer, group in enumerate((FULL, RING)):
            for position in second.held(layer).tolist():
                naive[group].places[position % second.most_places(group)] = position
        claim(second, naive, 12)
        first.close()
        second.close()


def test_places_are_positions_where_rings_are_not_wanted() -> None:
    layout = CacheLayout("f32", "place_dim", rings=False)
    assert capacity(16, 300, 8, layout) == 320
    layers = [LayerCache(RING, 16, 1, 16, 24)]
    assert cache_bytes(layers, 64, 16, layout) == 4 * 64 * (16 + 24)
    arena = KVArena(layers, 300, 8, layout)
    places, mask = np.zeros(8, np.int64), np.zeros((8, 256), np.float32)
    for first in range(0, 120, 8):
        arena.claim(RING, 8, places, mask)
        assert places.tolist() == list(range(first, first + 8))
        assert np.flatnonzero(mask[0] == 0).tolist() == list(range(max(first - 15, 0), first + 1))
        arena.advance(8)
    assert arena.truncate(30) == 30, "nothing is overwritten, so everything can be taken back"
    arena.close()


def test_what_is_not_held_is_not_handed_over() -> None:
    arena = filled(CacheLayout(), 150)
    with pytest.raises(ValueError, match="positions 0 to 9"):
        arena.export(1, 0, 10)
    with pytest.raises(ValueError, match="positions 149 to 150"):
        arena.export(0, 149, 2)
    small = KVArena([LayerCache(FULL, 0, 2, 8, 4), LayerCache(RING, 20, 1, 6, 10)], 100, 12)
    with pytest.raises(ValueError, match="150 positions of this model does not fit in one of 100"):
        small.copy_from(arena)
    with pytest.raises(ValueError, match="of this model"):
        arena_of(20, 200, 12).copy_from(arena)


def test_numbers_are_rounded_to_the_items_of_the_cache() -> None:
    wide, narrow = filled(CacheLayout("f32"), 5), filled(CacheLayout("f16"), 0)
    keys, values = wide.export(0, 0, 5)
    wide.import_(0, 0, keys + np.float32(1e-4), values * np.float32(1e9))
    narrow.copy_from(wide)
    assert np.array_equal(narrow.export(0, 0, 5)[0], (keys + np.float32(1e-4)).astype(np.float16))
    assert np.isinf(narrow.export(0, 0, 5)[1][1:]).all()
