"""Read tensors that stand in no file as they are asked for: put together, or computed, of what does stand there.

A row of a matrix that MLX quantized is three places in its file; a norm may be in half precision, or lack a one that
the architecture adds. Knows what a row is made of; everything else goes straight to the store below.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UnsupportedModel
from edgelm.files.affine import as_ggml, widen
from edgelm.files.errors import TruncatedFile
from edgelm.files.model import Derived, ModelFile, TensorInfo
from edgelm.memory.buffer import PAGE, Buffer, align_up
from edgelm.memory.stores import Store, check_request, open_loader, span

STEP_BYTES = 512 * 1024
"""Rows are made in steps of about this much source, in memory that each reading thread keeps."""


class DerivedStore:
    """`store` with the derived tensors of `model`."""

    def __init__(self, store: Store, model: ModelFile) -> None:
        self.below, self._path = store, model.paths[0]
        self._derived = sorted(model.derived.values(), key=lambda how: how.place.offset)
        self._file = self._derived[0].place.file
        self._end = model.file_bytes[self._file]
        assert all(how.place.file == self._file for how in self._derived), "all derived tensors share one file"
        self._starts = [how.place.offset for how in self._derived]
        self._own = threading.local()

    @property
    def how(self) -> str:
        return self.below.how

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        if file != self._file:
            return self.below.read_into(file, offset, n_bytes, buffer, at)
        check_request(offset, n_bytes, buffer, at)
        first, stop = at + offset % PAGE, offset + n_bytes
        if stop > self._end:
            raise TruncatedFile(self._path, f"what is derived from it ends at {self._end}, before byte {stop}")
        place = max(bisect_right(self._starts, offset) - 1, 0)
        while place < len(self._derived) and self._starts[place] < stop:
            how = self._derived[place]
            info = how.place
            begin, end = max(offset, info.offset), min(stop, info.offset + info.n_bytes)
            if begin < end:
                out = np.frombuffer(buffer, np.uint8, end - begin, first + begin - offset)
                self._make(how, begin - info.offset, out)
            place += 1
        return first

    def close(self) -> None:
        self.below.close()

    def _make(self, how: Derived, start: int, out: NDArray[np.uint8]) -> None:
        """Write the bytes of a tensor from byte `start` on, as many as `out` holds."""
        if how.how == "given":
            out[...] = np.frombuffer(how.content, np.uint8, len(out), start)
        elif how.how == "copy":
            for done in range(0, len(out), STEP_BYTES):
                step = out[done : done + STEP_BYTES]
                step[...] = self._read(how.sources[0], start + done, len(step), 0)
        else:
            self._make_rows(how, start, out)

    def _make_rows(self, how: Derived, start: int, out: NDArray[np.uint8]) -> None:
        """Write rows; a range that begins or ends inside a row takes its part of it."""
        row_bytes = how.place.row_bytes
        source_bytes = sum(source.row_bytes for source in how.sources)
        per_step = max(STEP_BYTES // max(source_bytes, row_bytes), 1)
        row, skipped = divmod(start, row_bytes)
        done = 0
        while done < len(out):
            n_rows = min(per_step, -(-(len(out) - done + skipped) // row_bytes))
            n = min(n_rows * row_bytes - skipped, len(out) - done)
            if n == n_rows * row_bytes:
                self._fill(how, row, out[done : done + n].reshape(n_rows, -1))
            else:
                made = np.empty((n_rows, row_bytes), np.uint8)
                self._fill(how, row, made)
                out[done : done + n] = made.reshape(-1)[skipped : skipped + n]
            row, skipped, done = row + n_rows, 0, done + n

    def _fill(self, how: Derived, row: int, out: NDArray[np.uint8]) -> None:
        """Write rows from number `row` on, as many as `out` has."""
        n_rows = len(out)
        parts = []
        for slot, source in enumerate(how.sources):
            raw = self._read(source, row * source.row_bytes, n_rows * source.row_bytes, slot)
            parts.append(raw.reshape(n_rows, -1))
        if how.how == "float32":
            out[...] = (widen(how.sources[0].type, parts[0]) + np.float32(how.plus)).view(np.uint8)
        elif how.how == "affine":
            np.concatenate(parts, axis=1, out=out)
        else:
            assert how.form is not None
            try:
                out[...] = as_ggml(how.form, np.concatenate(parts, axis=1))
            except OverflowError:
                raise UnsupportedModel(
                    f"{self._path}: tensor {how.place.name!r} has scales too large for ggml's types; "
                    "use a backend that computes with MLX's weights"
                ) from None

    def _read(self, source: TensorInfo, start: int, n_bytes: int, slot: int) -> NDArray[np.uint8]:
        """Return bytes of a source, valid until this thread reads into the slot again."""
        buffers: dict[int, Buffer] = self._own.__dict__.setdefault("buffers", {})
        offset = source.offset + start
        needed = span(offset, n_bytes)
        if slot not in buffers or buffers[slot].n_bytes < needed:
            if slot in buffers:
                buffers.pop(slot).release()
            buffers[slot] = Buffer(align_up(needed + PAGE))
        first = self.below.read_into(source.file, offset, n_bytes, buffers[slot].view, 0)
        return np.frombuffer(buffers[slot].view, np.uint8, n_bytes, first)


def derived(store: Store, file: ModelFile) -> Store:
    """Return `store` with the file's derived tensors, `store` itself if there are none."""
    return DerivedStore(store, file) if file.derived else store


def derived_loader(paths: Sequence[str], store: Store, file: ModelFile) -> Store:
    """Return what `open_loader` does for a store that `derived` made."""
    if not isinstance(store, DerivedStore):
        return open_loader(paths, store)
    below = open_loader(paths, store.below)
    return store if below is store.below else DerivedStore(below, file)
