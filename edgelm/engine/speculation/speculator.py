"""Decides before every pass what to guess, and learns from what came of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelm.engine.speculation.chances import Chances
from edgelm.engine.speculation.controller import Allowance, goodput, nodes_for
from edgelm.engine.speculation.curve import Curve
from edgelm.engine.speculation.drafts import NOTHING, ROOT, Draft, Drafter
from edgelm.engine.speculation.lookup import Lookup
from edgelm.engine.speculation.model_draft import ModelDraft
from edgelm.engine.speculation.recycling import SUCCESSORS, Recycling
from edgelm.engine.speculation.tree import Grown, grow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgelm.engine.generate import Conversation
    from edgelm.engine.running import Running

RECYCLING_WIDTH, RECYCLING_COST = 8, 1.5
"""Recycled guesses are seldom right: they are made where a pass of so many rows costs no more than so many of one."""

PROBED = 24
"""After so many times the time of a plain pass there is one again: guessing is compared with it."""

FRESH, RETRIED = 0.3, 1.02
"""How much the newest round of a draft model counts in what it is known to yield, and how that grows while it rests, so
that it is tried again."""


@dataclass(slots=True)
class Counts:
    """What happened so far: passes after the prompt, tokens guessed, and those that were right."""

    passes: int = 0
    drafted: int = 0
    accepted: int = 0


class Speculator:
    """Guesses for one conversation."""

    def __init__(self, engine: Running, draft: Conversation | None = None) -> None:
        """`draft`: of a smaller model of the same vocabulary."""
        self._engine = engine
        self._chances = Chances()
        self._model = ModelDraft(draft, self._chances, engine.n_vocab) if draft is not None else None
        self._allowance, self._since_plain_s = Allowance(), 0.0
        self._forget()
        self._plan, self._curve = engine.plan, Curve(engine.plan)
        self._at_root = Grown()
        self._model_tps, self._model_s = 0.0, 0.0  # what its rounds yielded lately (0: unknown); its time in this round

    def _forget(self) -> None:
        self._lookup, self._recycling = Lookup(self._chances), Recycling(self._chances)
        self._n_told = 0

    def drop_model(self) -> None:
        """Go on without the draft model."""
        self._model = None

    def begin(self, ids: Sequence[int]) -> None:
        """Take these ids as the text so far; the pass for the last of them is done."""
        if self._may_guess:
            self._lookup.begin(ids)
            self._recycling.begin(ids)
            self._n_told = len(ids)
            if self._model is not None:
                self._model.begin(ids[:-1], self._curve)

    @property
    def successors(self) -> int:
        """How many of the likeliest ids of each row `learn` wants to be told; 0: none."""
        return SUCCESSORS if self._recycles else 0

    @property
    def _may_guess(self) -> bool:
        """Whether the plan has room for guesses, and for what the drafters remember."""
        return self._engine.max_rows > 1

    @property
    def _recycles(self) -> bool:
        if not self._may_guess:
            return False
        width = min(RECYCLING_WIDTH, self._engine.max_rows)
        return self._curve.seconds(width) * self._curve.doubt < RECYCLING_COST * self._curve.seconds(1)

    def draft(self, history: Sequence[int], most_rows: int, forced: Sequence[int] = ()) -> Draft:
        """Return what to verify after `history` in a pass of up to `most_rows` rows, of which its last token takes one.

        `forced` tokens are sure to come next.
        """
        engine = self._engine
        if engine.plan is not self._plan:  # another budget: other costs
            self._plan, self._curve, self._model_tps = engine.plan, Curve(engine.plan), 0.0
            if not self._may_guess:
                self._forget()
        if not self._may_guess:
            return NOTHING
        if len(history) != self._n_told:  # there was no room until now
            self.begin(history)
        most_rows = min(most_rows, engine.max_rows)
        drafters: list[Drafter] = [self._lookup]
        if self._recycles:
            drafters.append(self._recycling)
        if self._since_plain_s > PROBED * self._curve.seconds(1):
            most_rows = 1
        most = max(most_rows - 1, 0)
        grown, n_nodes = grow(drafters, min(most, 1), engine.trees, forced), 0
        # all others are no likelier than the first one: where that many of its kind would not pay, none are looked for
        if grown.reach and nodes_for(grown.reach * most, self._curve, most_rows, self._allowance.passes):
            grown = grow(drafters, most, engine.trees, forced)
            n_nodes = nodes_for(grown.reach, self._curve, most_rows, self._allowance.passes)
        self._at_root = grown
        self._model_s = 0.0
        if self._model is not None and most and not forced:
            by_text = goodput(1.0 + sum(grown.reach[:n_nodes]), 1 + n_nodes, self._curve) if n_nodes else 0.0
            if not self._model_tps or self._model_tps > by_text:
                began_s = time.perf_counter()
                guessed = self._model.grow(history, most, self._curve, engine.trees)
                if n_guessed := nodes_for(guessed.reach, self._curve, most_rows, self._allowance.passes):
                    self._model_s = time.perf_counter() - began_s
                    return guessed.first(n_guessed)
            else:
                self._model_tps *= RETRIED
        return grown.first(n_nodes) if n_nodes else NOTHING

    def learn(self, draft: Draft, path: Sequence[int], tokens: Sequence[int], seconds: float) -> None:
        """Hear of a finished round: the nodes of `draft` that were right, and the tokens that came, one more of them.

        `seconds`: what the round took.
        """
        if not self._may_guess:
            return
        self._curve.passed(1 + len(draft.ids), seconds)
        self._since_plain_s = self._since_plain_s + seconds if draft.ids else 0.0
        if plain_s := self._curve.seconds(1):
            took_s = self._curve.seconds(1 + len(draft.ids)) + self._model_s
            self._allowance.add(len(tokens), took_s / plain_s)
        if draft.ids:
            for parent, token in zip((ROOT, *path), tokens, strict=True):
                for node in draft.children(parent):
                    self._outcome(draft.keys[node], draft.ids[node] == token)
        if self._model_s:
            tps = len(tokens) / (seconds + self._model_s)
            self._model_tps += (tps - self._model_tps) * (FRESH if self._model_tps else 1.0)
        if self._model_s or not draft.ids:  # what the text would have guessed
            grown = self._at_root
            for node, parent in enumerate(grown.parents):
                if parent == ROOT:
                    self._outcome(grown.keys[node], grown.ids[node] == tokens[0])
        for token in tokens:
            self._lookup.append(token)
            self._recycling.append(token)
        self._n_told += len(tokens)

    def recycle(self, token: int, successors: NDArray[np.int64]) -> None:
        """Remember what the model ranked first after a token."""
        self._recycling.learn(token, successors)

    @property
    def table(self) -> NDArray[np.uint32]:
        """What is known of successors; see `Recycling.table`."""
        return self._recycling.table

    @table.setter
    def table(self, table: NDArray[np.uint32]) -> None:
        self._recycling.table = table

    def _outcome(self, key: object, came_true: bool) -> None:
        if key is not None:  # forced tokens were no guess
            self._chances.learn(key, came_true)
