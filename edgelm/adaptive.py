"""The thread of an adaptive model: samples the system's memory, asks the policy, changes the budget, says so.

Knows threads and time. What to do is decided in `memory.adapt`; the model carries it out between two passes.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgelm.errors import BudgetTooSmall
from edgelm.memory.adapt import SAMPLE_S, Adapter
from edgelm.memory.platform import Platform, current_platform
from edgelm.sizes import human

if TYPE_CHECKING:
    from edgelm.model import Model


class Monitor:
    """Adapts one model from `start` to `stop`. A model that is dropped without being closed ends it, too.

    `announce` gets a sentence for each change, in the monitor's thread; nothing that happens there is raised.
    """

    def __init__(self, model: Model, announce: Callable[[str], None] | None, platform: Platform | None = None) -> None:
        self._model, self._announce = weakref.ref(model), announce
        self._platform = platform or current_platform()
        self._adapter = Adapter()
        self._floor = 1  # until a budget is refused: to look for the smallest one takes the time of some tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edgelm-adaptive", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Waits a moment for it, but not for an `announce` that does not return."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        try:
            while not self._stop.wait(SAMPLE_S):
                model = self._model()
                if model is None:
                    return
                self._step(model)
                del model  # only while it is used: a dropped model must not wait for this thread
        except Exception as error:  # whatever it is, the host's own threads go on
            if not self._stop.is_set():
                self._say(f"the budget is no longer adapted: {error}")

    def _step(self, model: Model) -> None:
        before, asked = model.plan, model.asked_bytes
        wanted = self._adapter.next_budget(
            asked, min(self._floor, asked), before.budget_bytes, before.planned_bytes, self._platform.pressure()
        )
        if wanted is None:
            return
        try:
            after = model.adapt_budget(wanted)
        except BudgetTooSmall as error:
            self._floor = error.needed_bytes
            after = model.adapt_budget(self._floor)
        if after.budget_bytes == before.budget_bytes:
            return
        why = "memory is short" if after.budget_bytes < before.budget_bytes else "memory is free again"
        self._say(f"{why}: budget {human(before.budget_bytes)} -> {human(after.budget_bytes)}")

    def _say(self, sentence: str) -> None:
        if self._announce is None:
            return
        try:
            self._announce(sentence)
        except Exception:
            traceback.print_exc()  # the caller's mistake: shown as in any thread, but the model goes on adapting
