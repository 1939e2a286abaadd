"""Which layers of a model may put their oldest keys and values on flash, and what that takes in memory.

Decides nothing: the planner asks. `spilled` computes, `edgelm.memory.spill` keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from edgelm.cachedir import cache_dir
from edgelm.engine.backend import Resting, Session
from edgelm.engine.demand import Model
from edgelm.engine.filtering import ANSWER_TOKENS, LAST, kept_tokens, ranking_bytes
from edgelm.engine.ir import AttendSpec
from edgelm.engine.state import FLOAT_BYTES
from edgelm.errors import UnsupportedModel
from edgelm.memory.arena import LayerCache
from edgelm.memory.bounded import bounded_bytes
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
    n_kept: int = 0
    """Places that a layer has on average once the prompt is read, see `important`; 0: all, exactly."""

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
        choosing_bytes = max(choosing_bytes_of(spec, context, len(self.specs)) for spec in self.specs)
        return shape, N_SLOTS * shape.slot_bytes + work_bytes + choosing_bytes * bool(self.n_kept)

    def kv_bytes(self, shape: SpillShape) -> int:
        """Return the memory of keys and values: the newest ones, or what is kept when the prompt is read.

        One layer may lie in both at a time.
        """
        if not self.n_kept:
            return shape.memory_bytes
        layers = [layer for _, layer in self.layers]
        most = max(bounded_bytes(layer, self.n_kept + ANSWER_TOKENS) for layer in layers)
        largest = max(bounded_bytes(layer, shape.context + ANSWER_TOKENS) for layer in layers)
        return max(shape.memory_bytes, most * len(layers)) + largest


def choosing_bytes_of(spec: AttendSpec, context: int, n_layers: int) -> int:
    """Return the memory in which places are chosen: keys of a layer, ranks of all, and the last queries of all."""
    keys = context * spec.n_kv_heads * spec.head_dim_k * FLOAT_BYTES
    queries = n_layers * LAST * spec.n_heads * spec.head_dim_k * FLOAT_BYTES
    return keys + queries + context * (n_layers * FLOAT_BYTES + ranking_bytes(spec))


def spilling_of(model: Model, n_threads: int) -> tuple[Model, Spilling] | None:
    """Return the model with an arena for the other layers only, and those that may spill; None if there are none."""
    specs = tuple(spec for spec in model.trace.attends if not spec.window)
    layers = tuple((spec.layer, model.layers[spec.layer]) for spec in specs)
    if not layers:
        return None
    left = tuple(layer if layer.window else elsewhere(layer) for layer in model.layers)
    return model._replace(layers=left), Spilling(specs, layers, n_threads)


def bounded_of(model: Model, context: int, kept: float, n_threads: int) -> tuple[Model, Spilling]:
    """Return what `spilling_of` does for a cache that keeps the share `kept` of a context.

    Raises `UnsupportedModel` for a model that embeds texts, or has no layer that sees everything.
    """
    found = None if model.encodes else spilling_of(model, n_threads)
    if found is None:
        raise UnsupportedModel(
            "no layer of this model keeps all of a prompt, so there is nothing to choose from; leave out the "
            "approximate attention"
        )
    return found[0], found[1]._replace(n_kept=kept_tokens(context, kept))


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
    facts = (cache, spilling.specs, plan.chunk, spilling.n_threads, rest)
    if spilling.n_kept:
        from edgelm.engine.important import Important

        return Important(*facts, n_kept=spilling.n_kept)
    return Spilled(*facts)
