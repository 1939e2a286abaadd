"""Put the matrices of a model into the layout of a backend, once: a prepared file, which starts as any other model.

Weights pass through a few tiles of memory and leave no page cache. One process prepares at a time; what a killed one
left behind is cleared by the next. Where prepared files are kept, and for how long, is `files.prepared`'s.
"""

from __future__ import annotations

import ctypes
import math
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from edgelm.engine.backend import WeightLayout
from edgelm.engine.machine import digest, edgelm_version, machine_key
from edgelm.errors import PreparationError, UnsupportedModel
from edgelm.files import prepared as kept
from edgelm.files.index import content_key
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.memory.buffer import PAGE, Buffer, align_up
from edgelm.sizes import MIB

if TYPE_CHECKING:
    from edgelm.memory.stores import Store

FORMAT = 1
"""Counts up when prepared files look different."""
_READ_BYTES = 1 * MIB
"""About what is read at a time, if a tile is not larger."""
_FLUSH_BYTES = 8 * MIB
"""Written bytes that may wait in the page cache."""


class Prepared(NamedTuple):
    """A model in a layout. `exists`: its file is there; else `file` says what it would be. `errors`: what is lost."""

    file: ModelFile
    exists: bool
    errors: tuple[str, ...]


def look_up(source: ModelFile, layout: WeightLayout) -> Prepared:
    """Return the model in this layout, without reading or writing a weight. A file made before is found in a moment.

    Raises `UnsupportedModel` for a model that cannot be recorded.
    """
    path = kept.path_of(source, _key(source, layout))
    file = kept.open_prepared(path, source)
    exists = file is not None
    if file is None:
        tensors, gathered = arrange(source, layout)
        file = kept.placed(source, path, tensors, gathered, _end(tensors)) if tensors else source
    packed = [layout.packed(source.tensors[name]) for name, info in file.tensors.items() if info.packed_row_bytes]
    errors = dict.fromkeys(one.error for one in packed if one is not None and one.error)
    return Prepared(file, exists or file is source, tuple(errors))


def prepare_file(
    source: ModelFile,
    layout: WeightLayout,
    backend: str,
    progress: Callable[[int, int], None] | None = None,
) -> ModelFile:
    """Return the model in this layout, and make its file if it is not there. `progress(done, total)` hears of bytes.

    A model that the layout leaves alone comes back as it is. Waits while another process prepares. Raises
    `PreparationError` if there is no room or the file cannot be written.
    """
    path = kept.path_of(source, _key(source, layout))
    tensors, gathered = arrange(source, layout)
    if not tensors:
        return source
    try:
        with _alone():
            file = kept.open_prepared(path, source)  # perhaps the process that we waited for has made it
            if file is None:
                index = kept.index_of(source.name, backend, tensors, gathered)
                _make(path, source, tensors, index, layout, progress)
                file = kept.open_prepared(path, source)
    except OSError as error:
        raise PreparationError(
            f"the weights cannot be prepared for the {backend} backend: {path} cannot be written "
            f"({error.strerror or error}); make room, or set EDGELM_CACHE to another folder"
        ) from error
    if file is None:
        raise PreparationError(f"{path} is not what was written there; check the drive that holds it")
    return file


def arrange(source: ModelFile, layout: WeightLayout) -> tuple[tuple[TensorInfo, ...], frozenset[str]]:
    """Return the packed matrices, placed in pass order from 0 on, and the names of those whose rows are looked up.

    Raises `UnsupportedModel` for a matrix of one row that the backend would expect packed.
    """
    from edgelm.engine.architecture import record
    from edgelm.engine.demand import describe
    from edgelm.engine.loading import default_context
    from edgelm.engine.registry import get_architecture

    model = describe(record(get_architecture(source.architecture), source, default_context(source)), source.tensors)
    for op in model.trace.ops:
        if op.kind == "linear" and (info := source.tensors[op.weights[0].tensor]).n_rows == 1 and layout.packed(info):
            raise UnsupportedModel(f"tensor {info.name!r} is a matrix of one row; use another backend")
    tensors: list[TensorInfo] = []
    for info in model.matrices:
        if (packed := layout.packed(info)) is not None:
            tensors.append(
                info._replace(
                    file=0,
                    offset=_end(tensors),
                    n_bytes=info.n_rows * packed.row_bytes,
                    row_step=packed.row_step,
                    packed_row_bytes=packed.row_bytes,
                )
            )
    return tuple(tensors), frozenset({model.embedding.name} & {info.name for info in tensors})


def packed_bytes(layout: WeightLayout | None, info: TensorInfo, content: bytes) -> bytes | bytearray:
    """Return a whole matrix as a backend wants it; `content` are its rows as in the file. Vectors stay as they are."""
    packed = layout.packed(info) if layout is not None and info.n_rows > 1 else None
    if layout is None or packed is None:
        return content
    out = bytearray(info.n_rows * packed.row_bytes)
    for first in range(0, info.n_rows, packed.row_step):
        last = min(first + packed.row_step, info.n_rows)
        rows = memoryview(content)[first * info.row_bytes : last * info.row_bytes]
        layout.pack(info, first, rows, memoryview(out)[first * packed.row_bytes : last * packed.row_bytes])
    return out


def _end(tensors: list[TensorInfo] | tuple[TensorInfo, ...]) -> int:
    """Return where the next tensor begins."""
    return align_up(tensors[-1].offset + tensors[-1].n_bytes) if tensors else 0


def _key(source: ModelFile, layout: WeightLayout) -> str:
    return digest(FORMAT, content_key(source), layout.key, edgelm_version(), machine_key())


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the lock of the folder among all processes; remove what one that was killed has left there."""
    from filelock import FileLock  # brings asyncio along: only who prepares pays for it

    from edgelm.files.writing import PARTIAL

    kept.folder().mkdir(parents=True, exist_ok=True)
    with FileLock(kept.folder() / "lock"):
        for path in kept.folder().glob(f"*{PARTIAL}"):
            path.unlink(missing_ok=True)
        yield


def _make(
    path: Path,
    source: ModelFile,
    tensors: tuple[TensorInfo, ...],
    index: bytes,
    layout: WeightLayout,
    progress: Callable[[int, int], None] | None,
) -> None:
    from edgelm.files import pack as form
    from edgelm.files.writing import whole_or_nothing

    sums_at = _end(tensors)
    index_at = align_up(sums_at + 8 * sum(map(form.n_tiles, tensors)))
    file_bytes = align_up(index_at + len(index)) + PAGE
    kept.make_room(file_bytes, path)
    digest_of = form.hasher(source.paths[0])
    with whole_or_nothing(path) as file:
        out = _Output(file)
        sums = _convert(out, source, tensors, layout, digest_of, progress)
        sections = []
        for kind, at, content in ((form.CHECKSUMS, sums_at, sums.tobytes()), (form.INDEX, index_at, index)):
            out.pad(at)
            out.write(content)
            sections.append(form.Section(kind, 1, at, len(content), digest_of(content)))
        out.pad(file_bytes - PAGE)
        out.write(form.footer(sections, file_bytes, digest_of, kept.MAGIC))
        out.flush()


def _convert(
    out: _Output,
    source: ModelFile,
    tensors: tuple[TensorInfo, ...],
    layout: WeightLayout,
    digest_of: Callable[[Any], int],
    progress: Callable[[int, int], None] | None,
) -> array[int]:
    """Write all tiles and return their checksums."""
    from edgelm.memory.derived import derived
    from edgelm.memory.stores import open_store, span
    from edgelm.memory.verified import verified

    sums = array("Q")
    done, total = 0, sum(source.tensors[info.name].n_bytes for info in tensors)
    plain, _ = open_store([str(path) for path in source.paths])
    store = verified(derived(plain, source), source)
    steps = [_rows_at_once(source.tensors[info.name], info) for info in tensors]
    read_bytes = max(
        span(PAGE - 1, rows * source.tensors[info.name].row_bytes) for rows, info in zip(steps, tensors, strict=True)
    )
    try:
        with Buffer(read_bytes) as read, Buffer(max(info.row_step * info.row_bytes for info in tensors)) as tile:
            for info, rows in zip(tensors, steps, strict=True):
                out.pad(info.offset)
                for content in _tiles(store, source.tensors[info.name], info, rows, layout, read, tile):
                    sums.append(digest_of(content))
                    out.write(content)
                    done += len(content) // info.row_bytes * source.tensors[info.name].row_bytes
                    if progress is not None:
                        progress(done, total)
    finally:
        store.close()
    return sums


def _tiles(
    store: Store,
    given: TensorInfo,
    info: TensorInfo,
    rows_at_once: int,
    layout: WeightLayout,
    read: Buffer,
    tile: Buffer,
) -> Iterator[memoryview]:
    """Yield the packed tiles of a matrix, each valid until the next."""
    row = given.row_bytes
    for start in range(0, info.n_rows, rows_at_once):
        n_rows = min(rows_at_once, info.n_rows - start)
        first = store.read_into(given.file, given.offset + start * row, n_rows * row, read.view, 0)
        for at in range(0, n_rows, info.row_step):
            n = min(info.row_step, n_rows - at)
            ctypes.memset(tile.address, 0, n * info.row_bytes)  # what a layout leaves out has the same bytes each time
            content = tile.view[: n * info.row_bytes]
            with read.view[first + at * row : first + (at + n) * row] as rows:
                layout.pack(given, start + at, rows, content)
            yield content


def _rows_at_once(given: TensorInfo, info: TensorInfo) -> int:
    """Return how many rows are read together: whole tiles of the layout and of the source's checksums."""
    step = math.lcm(info.row_step, given.row_step)
    return min(max(_READ_BYTES // (step * given.row_bytes), 1) * step, info.n_rows)


class _Output:
    """A file that is written from front to back and leaves at most `_FLUSH_BYTES` in the page cache."""

    def __init__(self, file: BinaryIO) -> None:
        from edgelm.memory.platform import current_platform

        self._file, self._platform, self._waiting = file, current_platform(), 0

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._waiting += len(content)
        if self._waiting >= _FLUSH_BYTES:
            self.flush()

    def pad(self, to: int) -> None:
        rest = to - self._file.tell()
        assert 0 <= rest < 2 * PAGE, rest
        self._file.write(bytes(rest))

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._platform.drop_cache(self._file.fileno())
        self._waiting = 0
