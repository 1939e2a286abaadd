"""Guessing: what is guessed, how much of it, and that the law of what is drawn stays that of plain sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edgelm.engine.generate import Conversation, token_ids
from edgelm.engine.passes import WIDTHS, width_for
from edgelm.engine.rows import Rows
from edgelm.engine.sampling import Sampling, make_sampler
from edgelm.engine.speculation.chances import Chances
from edgelm.engine.speculation.controller import nodes_for
from edgelm.engine.speculation.curve import Curve
from edgelm.engine.speculation.drafts import ROOT, Guess
from edgelm.engine.speculation.lookup import Lookup
from edgelm.engine.speculation.recycling import MOST_TOKENS, SUCCESSORS, Recycling
from edgelm.engine.speculation.speculator import Speculator
from edgelm.engine.speculation.tree import grow
from edgelm.memory.timeline import Times

FLAT = {n: 0.1 * (1 + 0.005 * (n - 1)) for n in WIDTHS}
STEEP = {n: 0.005 * n for n in WIDTHS}


def plan_of(costs: dict[int, float], streamed: bool = True, context: int = 512) -> Any:
    return SimpleNamespace(pass_s=costs.__getitem__, streamed=streamed, context=context, places=context)


class Table:
    """An engine whose next token depends on the last one alone. Counts its passes; `cost_s` says what they take."""

    trees = True

    def __init__(self, logits: np.ndarray, costs: dict[int, float] = FLAT, max_rows: int = 16) -> None:
        self.logits, self.n_vocab, self.max_rows = logits.astype(np.float32), len(logits), max_rows
        self.plan, self.times = plan_of(costs), Times()
        self.costs, self.seconds, self.widths = costs, 0.0, Counter[int]()
        self.stored: list[int] = []
        self.tried: list[int] = []

    @property
    def n_past(self) -> int:
        return len(self.stored)

    def truncate(self, n_past: int) -> int:
        del self.stored[n_past:]
        return n_past

    def forward(self, ids: Sequence[int], n_outputs: int = 1, progress: Any = None) -> np.ndarray:
        self.stored.extend(ids)
        self._passed(1)
        return self.logits[[ids[-1]]]

    def verify(self, ids: Sequence[int], parents: Sequence[int]) -> Rows:
        self.tried = list(ids)
        self._passed(len(ids))
        return Rows([self.logits[list(ids)]])

    def keep(self, rows: Sequence[int]) -> None:
        self.stored.extend(self.tried[row] for row in rows)

    def _passed(self, width: int) -> None:
        self.widths[width] += 1
        self.seconds += self.costs[width]


def spoken(
    engine: Table, prompt: Sequence[int], n: int, sampling: Sampling, speculator: Speculator | None
) -> list[int]:
    conversation = Conversation(engine)
    conversation.prefill(prompt)
    ids = list(token_ids(conversation, prompt, make_sampler(sampling), max_tokens=n, speculator=speculator))
    assert engine.stored == [*prompt, *ids][: engine.n_past]
    assert engine.n_past in (len(prompt) + len(ids) - 1, len(prompt) + len(ids))
    return ids


def learns_by_its_own_clock(engine: Table, speculator: Speculator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes cost what the engine says, not what the test machine takes."""
    learn = speculator.learn
    monkeypatch.setattr(
        speculator, "learn", lambda draft, path, ids, _: learn(draft, path, ids, engine.costs[1 + len(draft.ids)])
    )


# --- drafters


def proposals(drafter: Any, n: int) -> list[int]:
    path: list[int] = []
    while len(path) < n and (guesses := drafter.propose(path)):
        path.append(guesses[0].token)
    return path


def test_the_text_is_looked_up_by_its_longest_match() -> None:
    lookup = Lookup(Chances())
    lookup.begin([1, 2, 3, 10, 11, 9, 2, 3, 20, 21, 9, 1, 2, 3])
    assert proposals(lookup, 3) == [10, 11, 9]  # three tokens match there, two at the later place
    lookup.append(20)
    assert proposals(lookup, 2) == [21, 9]
    lookup.append(55)
    assert proposals(lookup, 2) == []


def test_a_text_that_repeats_itself_goes_on_repeating() -> None:
    lookup = Lookup(Chances())
    lookup.begin([7, 8, 9] * 4)
    assert proposals(lookup, 8) == [7, 8, 9, 7, 8, 9, 7, 8]
    assert lookup.propose([7, 8, 5]) == ()


def test_a_longer_prompt_keeps_the_index_of_its_beginning_and_another_one_does_not() -> None:
    lookup = Lookup(Chances())
    lookup.begin([1, 2, 3, 4])
    lookup.begin([1, 2, 3, 4, 5, 1, 2])
    assert proposals(lookup, 2) == [3, 4]
    lookup.begin([9, 3, 4, 8, 3, 4])
    assert proposals(lookup, 2) == [8, 3]
    lookup.begin([])
    assert proposals(lookup, 2) == []


def test_what_the_model_ranked_first_is_guessed_again_and_the_table_is_bounded() -> None:
    recycling = Recycling(Chances())
    recycling.begin([5])
    assert recycling.propose([]) == ()
    recycling.learn(5, np.arange(100, 100 + SUCCESSORS))
    recycling.learn(100, np.arange(200, 200 + SUCCESSORS))
    assert [guess.token for guess in recycling.propose([])] == [*range(100, 100 + SUCCESSORS)]
    assert recycling.propose([100])[0].token == 200
    for token in range(1000, 1000 + MOST_TOKENS):
        recycling.learn(token, np.arange(SUCCESSORS))
    assert recycling.propose([]) == ()


# --- trees


class Fixed:
    """Proposes the same chances after every path."""

    def __init__(self, *chances: float) -> None:
        self.chances = chances

    def begin(self, ids: Sequence[int]) -> None: ...
    def append(self, token: int) -> None: ...
    def propose(self, path: Sequence[int]) -> Sequence[Guess]:
        return [Guess(i, i, chance) for i, chance in enumerate(self.chances)]


def test_trees_grow_best_first_and_put_the_likeliest_chain_first() -> None:
    tree = grow([Fixed(0.6, 0.3)], 6, branches=True)
    assert tree.reach == pytest.approx([0.6, 0.36, 0.3, 0.216, 0.18, 0.18])
    draft = tree.first(6)
    assert draft.parents[:3] == (ROOT, 0, 1)
    assert all(parent < node for node, parent in enumerate(draft.parents))
    for parent in (ROOT, *range(6)):
        ids = [draft.ids[child] for child in draft.children(parent)]
        assert len(ids) == len(set(ids))


def test_without_branches_the_tree_is_a_chain_and_forced_tokens_come_first() -> None:
    tree = grow([Fixed(0.6, 0.3)], 4, branches=False, forced=(41, 42))
    assert tree.ids == [41, 42, 0, 0]
    assert tree.parents == [ROOT, 0, 1, 2]
    assert tree.reach == pytest.approx([1.0, 1.0, 0.6, 0.36])


# --- how much


def test_much_is_guessed_where_passes_cost_the_same_and_nothing_where_every_row_costs() -> None:
    reach = [0.8**i for i in range(1, 32)]
    flat, steep = Curve(plan_of(FLAT)), Curve(plan_of(STEEP))
    assert nodes_for(reach, flat, 32) >= 7
    assert nodes_for(reach, flat, 4) == 3
    assert nodes_for(reach, steep, 32) == 0
    assert nodes_for([0.002] * 31, flat, 32) == 0
    assert nodes_for([], flat, 32) == 0


def test_what_passes_took_replaces_what_was_foretold() -> None:
    curve = Curve(plan_of(STEEP, streamed=False))
    for _ in range(5):
        curve.passed(1, 0.2)
        curve.passed(4, 0.22)
    assert (curve.seconds(1), curve.seconds(4)) == pytest.approx((0.2, 0.22))
    assert nodes_for([0.5] * 3, curve, 4) == 3
    assert [width_for(n, 16) for n in (0, 1, 5, 16, 100)] == [1, 1, 4, 16, 16]


def test_a_machine_that_becomes_faster_is_faster_at_every_width() -> None:
    curve = Curve(plan_of(STEEP, streamed=False))
    for seconds in (*[0.2] * 5, *[0.1] * 3):
        curve.passed(1, seconds)
        curve.passed(4, 1.5 * curve.seconds(1))
    assert (curve.seconds(1), curve.seconds(4)) == pytest.approx((0.1, 0.15))


def test_what_may_be_lost_bounds_the_width() -> None:
    curve, reach = Curve(plan_of(FLAT | {4: 0.15, 6: 0.18, 8: 0.2})), [0.9] * 7
    assert nodes_for(reach, curve, 8) == 7
    assert nodes_for(reach, curve, 8, allowed=-4.0) == 7
    assert nodes_for(reach, curve, 8, allowed=-6.0) == 0
    assert nodes_for([0.4] * 7, curve, 8, allowed=-0.1) == 7
    assert nodes_for([0.4] * 7, curve, 8, allowed=-0.2) == 2
    assert nodes_for([0.4] * 7, curve, 8, allowed=-0.5) == 0


def test_a_wrong_estimate_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if every guess is taken to be right, and passes to cost nothing more."""
    rng = np.random.default_rng(0)
    costs = {n: 0.005 * (1 + 0.3 * (n - 1)) for n in WIDTHS}
    engine = Table(rng.normal(0, 0.1, (400, 400)), costs)
    speculator = Speculator(engine)
    learns_by_its_own_clock(engine, speculator, monkeypatch)
    monkeypatch.setattr(Chances, "of", lambda self, key, first: self._known.setdefault(key, (0.9, 1.0)) and 0.9)
    ids = spoken(engine, [1, 2, 3], 600, Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1), speculator)
    assert sum(engine.widths.values()) > engine.widths[1]  # it was tried
    assert engine.seconds <= 1.025 * (len(ids) + 1) * costs[1]


@pytest.mark.parametrize("costs", [FLAT, STEEP], ids=["flash", "resident"])
def test_random_text_costs_next_to_nothing(costs: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """SmartSpec's promise, by the engine's own clock: never more than 3 % slower."""
    rng = np.random.default_rng(0)
    engine = Table(rng.normal(0, 0.1, (400, 400)), costs)
    speculator = Speculator(engine)
    learns_by_its_own_clock(engine, speculator, monkeypatch)
    ids = spoken(engine, [1, 2, 3], 400, Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1), speculator)
    assert engine.seconds <= 1.03 * (len(ids) + 1) * costs[1]


def test_repetitive_text_is_several_times_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    n = 24
    logits = np.eye(n)[np.roll(np.arange(n), -1)] * 20
    engine = Table(logits)
    speculator = Speculator(engine)
    learns_by_its_own_clock(engine, speculator, monkeypatch)
    ids = spoken(engine, [0, 1, 2], 300, Sampling(), speculator)
    assert ids == [i % n for i in range(3, 303)]
    assert engine.seconds < (len(ids) + 1) * FLAT[1] / 3


def cycle(n: int, step: int = 1) -> np.ndarray:
    """Return logits with which every token is followed by the one `step` after it."""
    return np.eye(n)[np.roll(np.arange(n), -step)] * 20


def drafted(engine: Table, draft: Table, n: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    speculator = Speculator(engine, Conversation(draft))
    learns_by_its_own_clock(engine, speculator, monkeypatch)
    return spoken(engine, [0, 1, 2], n, Sampling(), speculator)


def test_a_draft_model_guesses_what_the_text_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, draft = Table(cycle(500)), Table(cycle(500))
    ids = drafted(engine, draft, 300, monkeypatch)
    assert ids == list(range(3, 303))
    assert sum(engine.widths.values()) < 300 / 8


def test_a_draft_model_that_is_wrong_does_not_keep_the_text_from_guessing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, draft = Table(cycle(24)), Table(cycle(24, step=5))
    ids = drafted(engine, draft, 400, monkeypatch)
    assert ids == [i % 24 for i in range(3, 403)]
    assert sum(engine.widths.values()) < 400 / 6


def test_a_wide_guess_of_the_text_is_taken_before_a_short_one_of_a_draft_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft has too little context left to write on: what it yields is known, and the text yields more."""
    engine, draft = Table(cycle(24), max_rows=16), Table(cycle(24))
    draft.plan = plan_of(FLAT, context=100)
    ids = drafted(engine, draft, 400, monkeypatch)
    assert ids == [i % 24 for i in range(3, 403)]
    assert engine.widths[16] > 10
    assert draft.n_past <= 100


# --- the law of what is drawn


def test_greedy_and_seeded_streams_are_the_same_with_guesses() -> None:
    logits = np.random.default_rng(3).normal(0, 3, (30, 30))
    for sampling in (Sampling(), Sampling(temperature=0.8, seed=5), Sampling(temperature=1.3, top_k=5, seed=6)):
        engine, plain = Table(logits), Table(logits)
        speculator = Speculator(engine)
        for prompt in ([1, 2], [4, 5, 6]):
            engine.truncate(0)
            plain.truncate(0)
            assert spoken(engine, prompt, 200, sampling, speculator) == spoken(plain, prompt, 200, sampling, None)
        assert sum(engine.widths.values()) < sum(plain.widths.values())


@pytest.mark.parametrize("draws", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_draws_follow_the_law_of_the_model(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square against the exact law of pairs, from trees over a vocabulary of 8."""
    n = 8
    logits = np.random.default_rng(1).normal(0, 1.2, (n, n))
    engine = Table(logits)
    engine.plan = plan_of(FLAT, context=draws + 10)
    speculator = Speculator(engine)
    learns_by_its_own_clock(engine, speculator, monkeypatch)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    ids = spoken(engine, [0], draws, sampling, speculator)
    assert len(ids) > 2 * sum(engine.widths.values())  # most came from branches of trees
    law = np.exp(logits)
    law /= law.sum(axis=1, keepdims=True)
    pairs, seen = Counter(zip([0, *ids], ids, strict=False)), Counter([0, *ids[:-1]])
    expected = np.array([[seen[a] * law[a, b] for b in range(n)] for a in range(n)])
    found = np.array([[pairs[a, b] for b in range(n)] for a in range(n)])
    assert ((found - expected) ** 2 / expected).sum() < 94.5  # 56 degrees of freedom: one run in a thousand is above


def test_an_end_token_ends_inside_a_round_and_is_not_stored() -> None:
    n = 10
    engine = Table(np.eye(n)[np.roll(np.arange(n), -1)] * 20)
    speculator = Speculator(engine)
    for _ in range(3):
        engine.truncate(0)
        conversation = Conversation(engine)
        conversation.prefill([0, 1])
        ids = token_ids(conversation, [0, 1], make_sampler(), max_tokens=60, ends={7}, speculator=speculator)
        assert list(ids) == [2, 3, 4, 5, 6]
        assert 7 not in engine.stored


def test_the_limit_of_tokens_and_the_context_are_kept() -> None:
    n = 10
    engine = Table(np.eye(n)[np.roll(np.arange(n), -1)] * 20)
    engine.plan = plan_of(FLAT, context=40)
    speculator = Speculator(engine)
    assert len(spoken(engine, [0, 1, 2], 17, Sampling(), speculator)) == 17
    engine.truncate(0)
    assert len(spoken(engine, [0, 1, 2], 100, Sampling(), speculator)) == 38
    assert engine.n_past == 40
