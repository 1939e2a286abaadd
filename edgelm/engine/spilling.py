"""Which layers of a model may put their oldest keys and values on flash, and what that takes in memory.

Decides nothing: the planner asks. `spilled` computes, `edgelm.memory.spill` keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from edgelm.cachedir import cache_dir
from edgelm.engine.backend import Resting, Session
from edgelm.engine.demand import Model
from edgelm.engine.ir import AttendSpec
from edgelm.memory.arena import LayerCache
from edgelm.memory.plan import Plan
from edgelm.memory.spill_shape import N_SLOTS, PLACES, SpillShape, elsewhere, least_blocks
from edgelm.memory.stores import Store
from edgelm.memory.timeline import Times

if TYPE_CHECKING:
    from edgelm.engine.spilled import Spilled


class Spilling(NamedTuple):
    """The layers that see everything; `extra` of their blocks stay in memory beside those that a pass needs."""

    specs: tuple[AttendSpec, ...]
    layers: tuple[tuple[int, LayerCache], ...]
    n_threads: int
    extra: int = 0

    @property
    def apart(self) -> frozenset[int]:
        """The layers whose attention is computed between the segments."""
        return frozenset(layer for layer, _ in self.layers)

    def at(self, context: int, chunk: int) -> tuple[SpillShape, int]:
        """Return what stays in memory if passes have up to `chunk` positions, and the memory beside it."""
        from edgelm.engine.spilled import Sizes

        n_blocks = min(least_blocks(chunk) + self.extra, -(-context // PLACES))
        shape = SpillShape(self.layers, context, n_blocks)
        work_bytes = max(Sizes.of(spec, chunk, context).n_bytes(self.n_threads) for spec in self.specs)
        return shape, N_SLOTS * shape.slot_bytes + work_bytes


def spilling_of(model: Model, n_threads: int) -> tuple[Model, Spilling] | None:
    """Return the model with an arena for the other layers only, and those that may spill; None if there are none."""
    specs = tuple(spec for spec in model.trace.attends if not spec.window)
    layers = tuple((spec.layer, model.layers[spec.layer]) for spec in specs)
    if not layers:
        return None
    left = tuple(layer if layer.window else elsewhere(layer) for layer in model.layers)
    return model._replace(layers=left), Spilling(specs, layers, n_threads)


def open_spilled(
    spilling: Spilling,
    plan: Plan,
    session: Session,
    times: Times,
    beside: Callable[[Store], Store] | None,
) -> Spilled | None:
    """Make the file and the memory, if the plan has any. `session` is that of the backend.

    `beside`: how a store is read on the device of the weights, if that is slowed down.

    Raises `ScratchError` if there is no room for the file.
    """
    from edgelm.engine.spilled import Spilled
    from edgelm.memory.scratch import ScratchFile
    from edgelm.memory.spill import SpilledCache

    shape = plan.demand.spill
    if shape is None:
        return None
    file = ScratchFile(cache_dir(), shape.file_bytes)
    cache = SpilledCache(shape, file, beside(file) if beside else file, times)
    rest = session.rest if isinstance(session, Resting) else None
    return Spilled(cache, spilling.specs, plan.chunk, spilling.n_threads, rest)
