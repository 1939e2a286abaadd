"""Weights of which a backend keeps copies of its own: loaded one at a time, copied, and given back.

So nothing is in memory twice but the weight that is on its way. Decides nothing; what stays is the plan's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from edgelm.engine.backend import Adopting, Session
from edgelm.engine.ir import Weight
from edgelm.memory.pinned import PinnedWeights
from edgelm.memory.stores import Store
from edgelm.memory.units import Part

Progress = Callable[[int, int], None]


class AdoptedWeights:
    """The copies that one session holds, by weight."""

    def __init__(self, session: Adopting) -> None:
        self._session = session
        self._handles: dict[Weight, int] = {}

    def __getitem__(self, weight: Weight) -> int:
        """Return what stands for a weight in bindings."""
        return self._handles[weight]

    def keep(
        self,
        vectors: Mapping[Weight, int],
        matrices: Mapping[Weight, Part],
        constants: Sequence[Part],
        pinned: PinnedWeights,
        store: Store,
        n_readers: int,
        progress: Progress | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Hold these weights and nothing else: others are dropped first. `pinned` is empty afterwards.

        `vectors` lie in `constants`, at the addresses given. Raises what `store` raises, `Cancelled` if `cancelled`.
        """
        for weight in self._handles.keys() - vectors.keys() - matrices.keys():
            self._session.drop(self._handles.pop(weight))
        missing = {weight: part for weight, part in matrices.items() if weight not in self._handles}
        if not vectors.keys() <= self._handles.keys():
            pinned.keep(constants, store, n_readers)
            for weight, address in vectors.items():
                if weight not in self._handles:
                    self._handles[weight] = self._session.adopt(weight, address, matrix=False)
        done, total = 0, sum(part.n_bytes for part in missing.values())
        for weight, part in missing.items():
            pinned.keep([part], store, n_readers, cancelled=cancelled)
            address = pinned.address(part.file, part.offset)
            self._handles[weight] = self._session.adopt(weight, address, matrix=True)
            done += part.n_bytes
            if progress is not None:
                progress(done, total)
        pinned.keep([], store)

    def close(self) -> None:
        """Drop everything."""
        while self._handles:
            self._session.drop(self._handles.popitem()[1])


@contextmanager
def handed_over(session: Session, weights: Sequence[tuple[Weight, int, bool]]) -> Iterator[tuple[int, ...]]:
    """Give what stands for weights in the bindings of a session for as long as this lasts.

    Of each: itself, its address, and whether it is a matrix. That is the address, or a copy that the session keeps.
    """
    if not isinstance(session, Adopting):
        yield tuple(address for _, address, _ in weights)
        return
    handles: list[int] = []
    try:
        for weight, address, matrix in weights:
            handles.append(session.adopt(weight, address, matrix))
        yield tuple(handles)
    finally:
        for handle in handles:
            session.drop(handle)
