"""Grow the likeliest tree of guesses, best first."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from itertools import count

from edgelm.engine.speculation.drafts import ROOT, Draft, Drafter


class Grown:
    """Nodes in the order of their chance to be reached, each after its parent; `reach[i]` is that chance."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.keys: list[Hashable] = []
        self.reach: list[float] = []

    def first(self, n_nodes: int) -> Draft:
        """Return the tree of the `n_nodes` likeliest nodes, the likeliest chain first.

        Rows of that chain lie where the cache would have them anyway, so that they need not move.
        """
        chain, rest = [], []
        tip = ROOT
        for node in range(n_nodes):
            if self.parents[node] == tip:
                chain.append(node)
                tip = node
            else:
                rest.append(node)
        order = [*chain, *rest]
        place = {node: at for at, node in enumerate(order)} | {ROOT: ROOT}
        return Draft(
            tuple(self.ids[node] for node in order),
            tuple(place[self.parents[node]] for node in order),
            tuple(self.keys[node] for node in order),
        )


def grow(drafters: Sequence[Drafter], most: int, branches: bool, forced: Sequence[int] = ()) -> Grown:
    """Return a tree of up to `most` nodes; without `branches` a chain.

    `forced` tokens come first, and are sure.
    """
    tree, order = Grown(), count()
    waiting: list[tuple[float, int, int, int, Hashable, tuple[int, ...]]] = []

    def expand(node: int, path: tuple[int, ...], reach: float) -> None:
        seen: set[int] = set()
        if len(path) < len(forced):
            heapq.heappush(waiting, (-reach, next(order), node, forced[len(path)], None, path))
            return
        for drafter in drafters:
            for guess in drafter.propose(path):
                if guess.token not in seen:
                    seen.add(guess.token)
                    item = (-reach * guess.chance, next(order), node, guess.token, guess.key, path)
                    heapq.heappush(waiting, item)

    expand(ROOT, (), 1.0)
    while waiting and len(tree.ids) < most:
        negative, _, parent, token, key, path = heapq.heappop(waiting)
        if not branches:
            waiting.clear()
        node = len(tree.ids)
        tree.ids.append(token)
        tree.parents.append(parent)
        tree.keys.append(key)
        tree.reach.append(-negative)
        expand(node, (*path, token), -negative)
    return tree
