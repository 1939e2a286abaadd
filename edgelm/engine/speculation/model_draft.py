"""Guesses of a smaller model: it writes on while it is sure enough, and its second choices become branches."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgelm.engine.largest import largest
from edgelm.engine.logprobs import log_sum
from edgelm.engine.speculation.chances import Chances
from edgelm.engine.speculation.curve import Curve
from edgelm.engine.speculation.drafts import ROOT
from edgelm.engine.speculation.tree import Grown

if TYPE_CHECKING:
    from edgelm.engine.generate import Conversation

_STEPS = 10
_CHOICES = 3
"""Tokens looked at after each; but for the first they become branches."""
_LEAST = 0.02
"""How likely such a branch must at least be reached and right."""
_FRESH = 0.2
LIKELY = 0.9
"""How often a good guess is right."""


class ModelDraft:
    """A draft model and how long it takes for a token.

    It stops as SpecDec++ does (arXiv:2405.19715): when one more token brings less than its time is worth.
    """

    def __init__(self, conversation: Conversation, chances: Chances, n_vocab: int) -> None:
        """`n_vocab`: ids that the target knows."""
        self._conversation, self._chances, self._n_vocab = conversation, chances, n_vocab
        self._step_s = 0.0

    def begin(self, ids: Sequence[int], curve: Curve) -> None:
        """Read the text so far, so that the first round of the answer need not wait for that."""
        if self._may_pay(curve) and len(ids) < self._conversation.engine.plan.context:
            self._conversation.prefill(ids)

    def grow(self, history: Sequence[int], most: int, curve: Curve, branches: bool) -> Grown:
        """Return up to `most` guesses for what follows, those likeliest to be reached first."""
        conversation, tree = self._conversation, Grown()
        if len(history) + 1 >= conversation.engine.plan.context:
            return tree
        found: list[tuple[float, int, int, tuple[str, int, int]]] = []  # chance to be reached, parent, token, kind
        reach, expected, parent = 1.0, 1.0, ROOT
        if not self._may_pay(curve):
            return tree
        conversation.prefill(history)
        for depth in range(most):
            choices = self._choices()
            spine = len(found)
            for rank, (token, p) in enumerate(choices if branches else choices[:1]):
                key = ("model", rank, int(p * _STEPS))
                chance = reach * self._chances.of(key, p)
                if not rank or chance > _LEAST:
                    found.append((chance, parent, token, key))
            reach, parent = found[spine][0], spine
            expected += reach
            spent_s = curve.seconds(1) + depth * self._step_s
            likelier = sum(chance > reach for chance, *_ in found)
            if reach * spent_s < expected * self._step_s or max(likelier, depth + 1) >= most or conversation.is_full:
                break
            began_s = time.perf_counter()
            conversation.step(found[spine][2])
            took_s = time.perf_counter() - began_s
            self._step_s += (took_s - self._step_s) * (_FRESH if self._step_s else 1.0)
        return _sorted(found, most)

    def _may_pay(self, curve: Curve) -> bool:
        """Whether at least two good guesses would."""
        return (1 + LIKELY) * curve.seconds(1) >= curve.seconds(2) + 2 * self._step_s

    def _choices(self) -> list[tuple[int, float]]:
        """Return the likeliest next tokens with their probabilities, the likeliest first."""
        logits = self._conversation.logits[: self._n_vocab]
        ids = largest(logits, _CHOICES)
        total = log_sum(logits)
        return [(int(token), math.exp(float(logits[token]) - total)) for token in ids]


def _sorted(found: list[tuple[float, int, int, tuple[str, int, int]]], most: int) -> Grown:
    """Return guesses in the order of their chance; a parent, being likelier, comes before its children."""
    order = sorted(range(len(found)), key=lambda node: (-found[node][0], node))[:most]
    place = {node: at for at, node in enumerate(order)} | {ROOT: ROOT}
    tree = Grown()
    for node in order:
        reach, parent, token, key = found[node]
        tree.ids.append(token)
        tree.parents.append(place[parent])
        tree.keys.append(key)
        tree.reach.append(reach)
    return tree
