"""Another budget for a running engine, and the speed of the flash that its plan depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgelm.concessions import concessions
from edgelm.engine.demand import RESERVE_BYTES
from edgelm.engine.forward import Engine
from edgelm.engine.loading import Prepared
from edgelm.engine.phased import PhasedEngine
from edgelm.engine.phases import replan
from edgelm.errors import BudgetTooSmall
from edgelm.files.model import ModelFile
from edgelm.memory.plan import Plan
from edgelm.memory.platform import current_platform
from edgelm.memory.stores import Store
from edgelm.memory.verified import unverified
from edgelm.simulated import Device

if TYPE_CHECKING:
    from edgelm.memory.flash import ReadPattern

MAY_STREAM = 3
"""Times its weights that a model may take with its cache and all else; with more room it surely stays in memory."""


class Replanning:
    """Plans another budget for a running engine, with its flash measured, which a resident model has no use for."""

    def __init__(self, prepared: Prepared, engine: Engine) -> None:
        self._prepared, self._engine = prepared, engine

    def __call__(self, budget_bytes: int, more_bytes: int) -> tuple[Plan, tuple[str, ...]]:
        """Return the plan, with `more_bytes` in memory that were not when the model was loaded, and notes on it."""
        if self._engine.pattern is None:
            self._prepared = _with_flash(self._prepared, self._engine)
        try:
            plan = replan(_with_more(self._prepared, more_bytes), self._engine, budget_bytes)
        except BudgetTooSmall:
            request = self._prepared.request
            if not request.draft_bytes:
                raise
            without = self._prepared._replace(request=replace(request, draft_bytes=0))
            plan = replan(_with_more(without, more_bytes), self._engine, budget_bytes)
            self._prepared = without
            dropped = "the draft model was dropped: the budget holds only one; load the model again to have it back"
            return plan, (dropped, *concessions(plan, plan.context))
        return plan, concessions(plan, plan.context)


def _with_more(prepared: Prepared, more_bytes: int) -> Prepared:
    return prepared._replace(process_bytes=prepared.process_bytes + more_bytes)


def _with_flash(prepared: Prepared, engine: Engine) -> Prepared:
    """Return what a model was prepared from with its flash measured."""
    if prepared.rates is None:
        return prepared
    engine.pattern = flash_pattern(unverified(engine.store), prepared.file, RESERVE_BYTES)
    rates = prepared.rates._replace(flash_bytes_per_s=engine.pattern.bytes_per_s)
    prompts = prepared.prompts
    if prompts is not None and isinstance(engine, PhasedEngine) and engine.prompts.pattern is None:
        prompts = _with_flash(prompts, engine.prompts)
    return prepared._replace(pattern=engine.pattern, rates=rates, prompts=prompts)


def flash_pattern(store: Store, file: ModelFile, limit_bytes: int, device: Device | None = None) -> ReadPattern:
    """Return how the flash under `store` is read best; measured within `limit_bytes`, unless a device is simulated."""
    from edgelm.memory.flash import DEFAULT_SHAPE, ReadPattern  # resident models do without

    if device is not None:
        speed = device.read_bytes_per_s(DEFAULT_SHAPE.block_bytes)
        return ReadPattern(*DEFAULT_SHAPE, store.how, speed, device.latency_s, 0.0)
    from edgelm.engine.reading import read_pattern

    return read_pattern(store, file, limit_bytes)


def may_stream(file: ModelFile, budget_bytes: int) -> bool:
    """Say whether the flash's speed can matter: whether weights, with what comes with them, could miss the budget."""
    return MAY_STREAM * file.total_tensor_bytes > budget_bytes - current_platform().rss_bytes()
