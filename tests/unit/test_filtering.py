"""Which tokens of a prompt are kept by an approximate attention, how many, and what it refuses to be combined with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.approximate import KEPT, guesses, kept_share
from edgelm.engine.architecture import record
from edgelm.engine.demand import Model, describe
from edgelm.engine.filtering import FIRST, LAST, NEIGHBOURS, chosen, filtering_of, ranked
from edgelm.engine.ir import AttendSpec
from edgelm.engine.loading import open_path
from edgelm.engine.registry import get_architecture
from edgelm.engine.wishes import Wishes
from edgelm.errors import ConfigError, UnsupportedModel
from edgelm.memory.arena import cache_bytes
from edgelm.memory.cache_layout import USUAL
from edgelm.testing import tiny_model

SPEC = AttendSpec(1, 4, 2, 8, 8, 8**-0.5)
CONTEXT = 2048


def model_of(folder: Path, name: str, context: int = CONTEXT) -> Model:
    file = open_path(tiny_model(folder / f"{name}.gguf", name))
    return describe(record(get_architecture(file.architecture), file, context), file.tensors, file.gathered)


@given(n=st.integers(1, 300), n_kept=st.integers(FIRST + LAST, 300), seed=st.integers(0, 99))
def test_as_many_as_asked_in_order_with_both_ends(n: int, n_kept: int, seed: int) -> None:
    kept = chosen(np.random.default_rng(seed).random(n, np.float32), n_kept)
    assert len(kept) == min(n, n_kept)
    assert (np.diff(kept) > 0).all()
    if n > n_kept:
        assert set(range(FIRST)) <= set(kept)
        assert set(range(n - LAST, n)) <= set(kept)


@given(seed=st.integers(0, 99), n_kept=st.integers(FIRST + LAST, 199))
def test_more_room_keeps_what_less_room_kept(seed: int, n_kept: int) -> None:
    ranks = np.random.default_rng(seed).random(200, np.float32).round(1)  # many are equal
    assert set(chosen(ranks, n_kept)) <= set(chosen(ranks, n_kept + 1))


@pytest.mark.parametrize("place", [FIRST, 77, 500, 999])
@pytest.mark.parametrize("asking", [1, 9, LAST])
def test_a_needle_that_the_end_looks_for_is_kept_with_its_neighbours(place: int, asking: int) -> None:
    """Any of the last positions may be the one that looks for it."""
    random = np.random.default_rng(place)
    keys = random.standard_normal((1100, 2, 8), np.float32)
    queries = random.standard_normal((LAST, 4, 8), np.float32)
    queries[-asking] *= 3
    keys[place] = 3 * queries[-asking].reshape(2, 2, 8).mean(axis=1)
    kept = chosen(ranked(queries, keys, SPEC), FIRST + LAST + NEIGHBOURS)
    assert set(range(max(place - NEIGHBOURS // 2, 0), place + NEIGHBOURS // 2 + 1)) <= set(kept)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_ranks_are_causal_attention_summed_over_heads_and_the_last_positions(softcap: float) -> None:
    random = np.random.default_rng(1)
    keys, queries = random.standard_normal((50, 2, 8), np.float32), random.standard_normal((3, 4, 8), np.float32)
    expected = np.zeros(50)
    for row, query in enumerate(queries):
        end = 48 + row
        for head in range(4):
            scores = keys[:end, head // 2].astype(np.float64) @ query[head] * SPEC.scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            expected[:end] += np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(ranked(queries, keys, SPEC._replace(softcap=softcap)), expected, rtol=1e-5)


def test_the_cache_is_smaller_the_less_is_kept(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    whole = cache_bytes(model.layers, CONTEXT, 512)
    sizes = [
        filtering_of(model, CONTEXT, kept).kv_bytes(model.layers, CONTEXT, 512, USUAL)
        for kept in (0.05, 0.25, 0.5, 0.8)
    ]
    assert sizes == sorted(sizes)
    assert sizes[-1] < whole
    for kept in (0.001, 0.25, 0.5, 1.0):
        found = filtering_of(model, CONTEXT, kept)
        assert found.n_kept == max(round(kept * CONTEXT), FIRST + LAST)
        assert found.n_kept < found.places <= CONTEXT or kept == 1.0


def test_a_layer_that_sees_everything_ranks(tmp_path: Path) -> None:
    for name in ("llama", "gemma3", "gemma2"):
        model = model_of(tmp_path, name)
        found = filtering_of(model, CONTEXT, 0.25)
        assert not found.spec.window
        assert found.layer == found.spec.layer > 0
        assert [one.n_kv_heads > 0 for one in found.looking] == [i < found.layer for i in range(len(model.layers))]


def test_models_without_such_a_layer_are_refused(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    sliding = [op._replace(params=op.params._replace(window=8)) if isinstance(op.params, AttendSpec) else op
               for op in model.trace.ops]  # fmt: skip
    with pytest.raises(UnsupportedModel, match="sees a whole prompt"):
        filtering_of(model._replace(trace=model.trace._replace(ops=tuple(sliding))), CONTEXT, 0.25)
    with pytest.raises(UnsupportedModel, match="embeds texts"):
        filtering_of(model._replace(layers=()), CONTEXT, 0.25)


def test_exact_is_the_default() -> None:
    assert kept_share(Wishes()) is None
    assert kept_share(Wishes(attention="filtered")) == KEPT
    assert kept_share(Wishes(attention="filtered", kept=1.0)) is None
    assert guesses(Wishes(attention="filtered"))
    assert not guesses(Wishes(attention="important"))  # places would depend on how many tokens come at a time
    assert guesses(Wishes(attention="important", kept=1.0))


@pytest.mark.parametrize(
    ("wishes", "why"),
    [
        ({"attention": "fast"}, "unknown attention 'fast'"),
        ({"kept": 0.5}, "exact attention keeps everything"),
        ({"attention": "filtered", "kept": 0.0}, "above 0 and at most 1"),
        ({"attention": "filtered", "kept": 1.5}, "above 0 and at most 1"),
        ({"attention": "filtered", "backend": "npu+numpy"}, "one backend"),
        ({"attention": "filtered", "draft": "auto"}, "draft model reads whole prompts"),
        ({"attention": "filtered", "parallel": 4}, "one answer at a time"),
        ({"attention": "important", "spill": False}, "on flash"),
    ],
)
def test_what_cannot_work_is_refused(wishes: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        kept_share(Wishes(**wishes))  # type: ignore[arg-type]
