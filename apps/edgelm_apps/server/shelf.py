"""Conversations that had the engine lately, with what was computed of them: whoever comes back goes on from there.

The keys and values of one conversation are in the model. Those of the others lie in files of a temporary folder; the
one that was not asked for longest goes first. Reading them takes less time than computing them (`bench/prefix.py`).
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgelm.errors import ConfigError, ModelFileError
from edgelm.sequences import n_common

if TYPE_CHECKING:
    from edgelm import Model

WORTH_TOKENS = 48
"""Tokens that must be spared, so that files are written and read for it."""


class Shelf:
    """The conversations of one loaded model. Used by whoever has the engine."""

    def __init__(self, model: Model, most_bytes: int) -> None:
        self._model, self._most, self._number = model, most_bytes, 0
        self._folder = tempfile.TemporaryDirectory(prefix="edgelm-serve-", ignore_cleanup_errors=True)
        self._kept: OrderedDict[Path, tuple[Sequence[int], int]] = OrderedDict()
        self._works = True

    def provide(self, ids: Sequence[int]) -> None:
        """Let the model hold the conversation that has most in common with a prompt, and put its present one away."""
        stored = self._model.stored
        here = n_common(stored, ids)
        if not self._works or here >= len(ids) - 1:
            return
        best = max(self._kept, key=lambda path: n_common(self._kept[path][0], ids), default=None)
        spared = n_common(self._kept[best][0], ids) if best is not None else 0
        if len(stored) - here >= WORTH_TOKENS:
            self._put_away(stored)
        if best is not None and best in self._kept and spared - here >= WORTH_TOKENS:
            self._take(best)

    def close(self) -> None:
        self._folder.cleanup()

    def _put_away(self, stored: Sequence[int]) -> None:
        for path, (ids, _) in list(self._kept.items()):
            if n_common(ids, stored) == len(ids):  # it went on
                self._drop(path)
        self._number += 1
        path = Path(self._folder.name, f"{self._number}.kv")
        try:
            self._kept[path] = stored, self._model.save_cache(path)
        except (ConfigError, OSError):  # of this backend none can be written, or there is no room
            self._works = False
            return
        while sum(n_bytes for _, n_bytes in self._kept.values()) > self._most:
            self._drop(next(iter(self._kept)))

    def _take(self, path: Path) -> None:
        self._kept.move_to_end(path)
        try:
            self._model.load_cache(path)
        except (ConfigError, ModelFileError, OSError):
            self._drop(path)

    def _drop(self, path: Path) -> None:
        self._kept.pop(path, None)
        path.unlink(missing_ok=True)
