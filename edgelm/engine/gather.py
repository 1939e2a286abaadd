"""Fetch the embedding rows of a pass: from pinned weights where the head shares them, else from flash."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from edgelm.engine.state import Workspace
from edgelm.files.model import TensorInfo
from edgelm.memory.pinned import PinnedWeights
from edgelm.memory.stores import Store
from edgelm.memory.units import part_of


class Gather:
    """Called with the ids of a pass, it fills the workspace's rows."""

    def __init__(
        self,
        info: TensorInfo,
        workspace: Workspace,
        store: Store,
        pinned: PinnedWeights,
        resident: Sequence[tuple[int, int]],
    ) -> None:
        """`resident`: rows, from one up to another, that are pinned in the layout of the file."""
        self._info, self._workspace, self._store, self._pinned = info, workspace, store, pinned
        self._resident = tuple(resident)

    def __call__(self, ids: Sequence[int]) -> None:
        info, workspace = self._info, self._workspace
        done: dict[int, int] = {}
        for i, token in enumerate(ids):
            target = workspace.rows_address + i * info.row_bytes
            source = done.get(token) or self._pinned_row(token) or self._read_row(token)
            ctypes.memmove(target, source, info.row_bytes)
            done[token] = target

    def _pinned_row(self, token: int) -> int | None:
        if any(first <= token < stop for first, stop in self._resident):
            return self._pinned.address(self._info.file, self._info.offset + token * self._info.row_bytes)
        return None

    def _read_row(self, token: int) -> int:
        row = part_of(self._info, token, 1)
        buffer = self._workspace.row_buffer
        return buffer.address + self._store.read_into(row.file, row.offset, row.n_bytes, buffer.view, 0)
