"""The models that are served, one of them loaded at a time: all of them share one memory budget.

Whoever has the engine may ask for a model; nobody else does meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm_apps.server.errors import NoSuchModel
from edgelm_apps.server.shelf import Shelf

if TYPE_CHECKING:
    from edgelm import Model


@dataclass(frozen=True, slots=True)
class Served:
    """A model by its name."""

    name: str
    path: Path
    since: int = field(default_factory=lambda: int(time.time()))


class Pool:
    """Loads the model that is asked for, and closes the one that was there before."""

    def __init__(
        self,
        models: Mapping[str, Path],
        options: Mapping[str, Any],
        told: Callable[[str], None] = lambda _: None,
        shelf_bytes: int = 0,
    ) -> None:
        """`options`: of `edgelm.load`, for all models. `told` hears of what is loaded, and how."""
        self.served = {name: Served(name, path) for name, path in models.items()}
        self._options, self._told, self._shelf_bytes = dict(options), told, shelf_bytes
        self.loaded: Model | None = None
        self.shelf: Shelf | None = None
        self.name: str | None = None
        self.swaps = 0

    def find(self, name: str) -> Served:
        """Return the model of this name; raises `NoSuchModel`. An empty name is the first model."""
        if not name:
            return next(iter(self.served.values()))
        if name not in self.served:
            raise NoSuchModel(name, list(self.served))
        return self.served[name]

    async def get(self, served: Served) -> Model:
        """Return this model, loaded. Raises what `edgelm.load` raises; then no model is loaded."""
        if self.loaded is not None and self.name == served.name:
            return self.loaded
        loading = asyncio.ensure_future(asyncio.to_thread(self._load, served))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:
            await loading  # a thread cannot be stopped, and the next one must not load beside it
            raise

    def _load(self, served: Served) -> Model:
        from edgelm_apps.engine import open_model, start_lines

        self.close()
        model = open_model(served.path, self._options, quiet=True)
        self.loaded, self.name, self.shelf = model, served.name, None
        if self._shelf_bytes:
            self.shelf = Shelf(model, self._shelf_bytes)
        self.swaps += 1
        for line in start_lines(model):
            self._told(f"{served.name}: {line}")
        return model

    async def set_budget(self, memory: int) -> None:
        """Go over to another budget, also while an answer is written, and for the models that follow."""
        if self.loaded is not None:
            await asyncio.to_thread(self.loaded.set_budget, memory)
        self._options["memory"] = memory

    def close(self) -> None:
        """Give the memory of the loaded model back."""
        model, self.loaded, self.name = self.loaded, None, None
        if model is not None:
            model.close()
        if self.shelf is not None:
            self.shelf.close()
            self.shelf = None
