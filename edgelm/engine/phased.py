"""An engine beside which another one fills the cache with prompts; see `phases`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.forward import Engine
from edgelm.memory.plan import Plan

LEAST_PROMPT = 16
"""Tokens that are worth handing to the engine of the prompts."""


class PhasedEngine(Engine):
    """Answers from the cache that `prompts` fills. The two share one cache, or what one stored is handed over."""

    def __init__(self, *args: Any, prompts: Engine) -> None:
        """`args`: see `Engine`. Owns `prompts` from here."""
        super().__init__(*args, times=prompts.times)
        self.prompts = prompts

    @property
    def bytes_streamed(self) -> int:
        return super().bytes_streamed + self.prompts.bytes_streamed

    def forward(
        self, ids: Sequence[int], n_outputs: int = 1, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Append `ids`, of a prompt all but those whose logits are wanted by the other engine; see `Engine.forward`."""
        n_before = len(ids) - n_outputs
        if n_before < LEAST_PROMPT:
            return super().forward(ids, n_outputs, progress)
        self.check(ids, n_outputs)
        self._hand_over(self, self.prompts)
        try:
            self.prompts.forward(ids[:n_before], progress=progress)
        finally:
            self._hand_over(self.prompts, self)  # what is stored counts, even if the rest was broken off
        if progress is not None:
            progress(n_before)
        return super().forward(ids[n_before:], n_outputs)

    @staticmethod
    def _hand_over(giver: Engine, taker: Engine) -> None:
        if giver.arena is not taker.arena:
            taker.arena.copy_from(giver.arena)

    def carry_out(self, plan: Plan) -> None:
        """Go over to another plan between two passes, both engines; who shrinks does so first."""
        assert plan.prompts is not None
        before = self.prompts.plan.planned_bytes
        try:
            if plan.prompts.planned_bytes <= before:
                self.prompts.carry_out(plan.prompts)
            super().carry_out(plan)
            if plan.prompts.planned_bytes > before:
                self.prompts.carry_out(plan.prompts)
        except BaseException:
            self.close()
            raise

    def cancel(self, on: bool = True) -> None:
        self.prompts.cancel(on)
        super().cancel(on)

    def close(self) -> None:
        self.prompts.close()
        super().close()
