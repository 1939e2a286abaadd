"""Attention in parts: any partition, merged in any order, is the softmax over everything."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.engine.lanes import quiet
from edgelm.engine.softmax import Part, clear, join, merge, weigh
from edgelm.engine.spilled import widen
from edgelm.files.blocks import Floats

ROWS, DIM = 5, 8


def attention(scores: Floats, values: Floats) -> np.ndarray:
    exact = scores.astype(np.float64)
    weights = np.exp(exact - exact.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ values.astype(np.float64)


def nothing(*lead: int) -> Part:
    part = Part(*(np.empty((*lead, ROWS, *more), np.float32) for more in ((), (), (DIM,))))
    clear(part)
    return part


@settings(max_examples=200, deadline=None)
@given(data=st.data(), n=st.integers(1, 300), spread=st.sampled_from((0.1, 3.0, 40.0)), seed=st.integers(0, 1000))
def test_any_partition_in_any_order_is_the_whole(data: st.DataObject, n: int, spread: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = (spread * rng.standard_normal((ROWS, n))).astype(np.float32)
    scores[rng.random((ROWS, n)) < 0.2] = -np.inf  # hidden places; every row sees one at least
    scores[:, rng.integers(n)] = 1
    values = rng.standard_normal((n, DIM)).astype(np.float32)
    order = rng.permutation(n)
    edges = sorted(data.draw(st.sets(st.integers(1, max(n - 1, 1)), max_size=12)) | {0, n})
    pieces = [order[a:b] for a, b in pairwise(edges)]
    waiting = [nothing() for _ in pieces]
    stacked = nothing(len(pieces))
    with quiet():
        for i, piece in enumerate(pieces):
            weigh(scores[:, piece], values[piece], waiting[i])
            weigh(scores[:, piece], values[piece], Part(*(numbers[i] for numbers in stacked)))
        while len(waiting) > 1:  # a random tree of merges
            into, part = waiting.pop(rng.integers(len(waiting))), waiting.pop(rng.integers(len(waiting)))
            merge(into, part)
            waiting.append(into)
        joined = join(stacked)
    expected = attention(scores, values)
    for whole in (waiting[0], joined):
        assert np.abs(whole.mixed / whole.total[:, None] - expected).max() < 1e-6 * max(1.0, np.abs(values).max())


def test_parts_of_which_nothing_is_seen_change_nothing() -> None:
    scores, values = np.zeros((ROWS, 3), np.float32), np.ones((3, DIM), np.float32)
    whole, unseen = nothing(), nothing()
    with quiet():
        weigh(scores.copy(), values, whole)
        before = Part(*(numbers.copy() for numbers in whole))
        weigh(np.full((ROWS, 3), -np.inf, np.float32), values, unseen)
        merge(whole, unseen)
        merge(whole, nothing())
    assert all(np.array_equal(a, b) for a, b in zip(whole, before, strict=True))


def test_every_half_is_widened_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(halves)
    wide = widen(halves, np.empty(len(halves), np.float32))
    assert np.array_equal(wide[finite].view(np.uint32), halves[finite].astype(np.float32).view(np.uint32))
    assert np.all(np.isfinite(wide))
    assert np.all(np.abs(wide[~finite]) >= 65_536)
