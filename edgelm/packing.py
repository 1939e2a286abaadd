"""Make a pack: a GGUF file laid out for streaming, with what a start needs appended (`docs/format.md`).

Written beside its final name and renamed when it is whole and on the disk. Weights pass through a few megabytes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from edgelm.engine.architecture import record
from edgelm.engine.demand import describe
from edgelm.engine.loading import default_context
from edgelm.engine.registry import get_architecture
from edgelm.errors import ConfigError, EdgeLMError
from edgelm.files import pack as form
from edgelm.files.copied_header import copied_header
from edgelm.files.errors import NotAModelFile
from edgelm.files.gguf import fingerprint_of, open_model
from edgelm.files.index import is_folder
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.files.summary import summary_of
from edgelm.files.writing import free_bytes, remove_leftovers, whole_or_nothing
from edgelm.hashing import blake2b
from edgelm.memory.buffer import Buffer, align_up
from edgelm.memory.stores import open_store, span
from edgelm.sizes import MIB, human
from edgelm.text.build import build_tables
from edgelm.text.tables import FORMAT as TABLES_FORMAT

SUFFIX = ".edgelm.gguf"
_BLOCK_BYTES = 4 * MIB
_OWN_KEYS = ("general.alignment", "split.", "edgelm.pack.")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
_SUM_BYTES = 8

Progress = Callable[[int, int], None]


class PackError(EdgeLMError):
    """A pack could not be written; nothing is left under its name."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A pack that was written. `weights_bytes` counts the tensors alone."""

    path: Path
    source: Path
    size_bytes: int
    weights_bytes: int
    n_tensors: int
    n_checksums: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies before a byte is written: `tensors` are the source's, `placed` the pack's, one order."""

    header: bytes
    tensors: tuple[TensorInfo, ...]
    placed: tuple[TensorInfo, ...]
    tables: tuple[bytes, ...]
    tables_at: int
    checksums_at: int
    index_at: int

    def file_bytes(self, index_bytes: int) -> int:
        return align_up(self.index_at + index_bytes) + form.PAGE

    @property
    def n_checksums(self) -> int:
        return sum(map(form.n_tiles, self.placed))


def pack(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Packed:
    """Write the GGUF model at `path` (of a split model: its first part) as a pack.

    Without `output` the pack lies beside the model, `NAME.edgelm.gguf`. Weights and metadata stay what they are; any
    program that reads GGUF reads the pack. `force` replaces a file that exists. `progress(done, total)` hears of bytes.

    Raises `PackError` where the file cannot be written, `UnsupportedModel` for a model that edgelm cannot run, and what
    `load` raises for a file that is damaged.
    """
    if is_folder(path):
        raise NotAModelFile(
            path,
            "packs are made of GGUF files, and a folder needs no pack",
            "load the folder: its weights stream as they are",
        )
    source = open_model(path)
    if form.VERSION_KEY in source.metadata:
        raise ConfigError(f"{path}: this is a pack already; give the GGUF file that it was made of")
    target = default_output(source.paths[0]) if output is None else Path(output)
    if target.is_dir():
        target /= default_output(source.paths[0]).name
    if target.exists() and not force:
        raise PackError(f"{target}: this file exists; replace it with force (--force), or name another output")
    if target.exists() and not target.is_file():
        raise PackError(f"{target}: this is a device or a pipe, not a file; name another output")
    name = source.paths[0].name
    layout = _lay_out(source, name)
    index = _index(source, layout, name)
    file_bytes = layout.file_bytes(len(index))
    try:
        with _with_room(target, file_bytes) as file:
            _write(file, source, layout, index, progress)
    except OSError as error:
        raise PackError(f"{target}: the pack cannot be written ({error.strerror or error}); {_hint(error)}") from error
    return Packed(
        target, source.paths[0], file_bytes, source.total_tensor_bytes, len(source.tensors), layout.n_checksums
    )


def default_output(path: Path) -> Path:
    """Return the name of the pack beside a model."""
    return path.with_name(_PART.sub("", path.stem) + SUFFIX)


def in_pass_order(source: ModelFile) -> tuple[TensorInfo, ...]:
    """Return the tensors as a pass reads them, each with the rows that one checksum covers.

    All vectors come first, then what is only looked up row by row, then matrices in the order of their use.
    """
    model = describe(record(get_architecture(source.architecture), source, default_context(source)), source.tensors)
    used = [source.tensors[weight.tensor] for weight in model.trace.weights()]
    every = dict.fromkeys((*used, *source.tensors.values()))
    vectors = [info for info in every if info.n_rows == 1]
    looked_up = [info for info in every if info.n_rows > 1 and info not in model.matrices]
    return (
        *(_in_tiles(info, 1) for info in (*vectors, *looked_up)),
        *(_in_tiles(info, form.tile_rows(info.n_rows, info.row_bytes)) for info in model.matrices),
    )


def _in_tiles(info: TensorInfo, row_step: int) -> TensorInfo:
    return TensorInfo(info.name, info.type, info.shape, info.file, info.offset, info.n_bytes, row_step)


def _at(info: TensorInfo, offset: int) -> TensorInfo:
    return TensorInfo(info.name, info.type, info.shape, 0, offset, info.n_bytes, info.row_step)


def _lay_out(source: ModelFile, name: str) -> _Layout:
    tensors = in_pass_order(source)
    offsets = [0, *accumulate(align_up(info.n_bytes) for info in tensors)]
    own = _own_metadata(name)
    header = copied_header(source.paths[0], list(map(_at, tensors, offsets)), own, _OWN_KEYS)
    start = align_up(len(header))
    placed = tuple(_at(info, start + at) for info, at in zip(tensors, offsets[:-1], strict=True))
    tables = tuple(build_tables(source.metadata))
    tables_at = align_up(start + offsets[-1], form.MAP_ALIGNMENT)
    checksums_at = align_up(tables_at + sum(map(len, tables)))
    index_at = align_up(checksums_at + _SUM_BYTES * sum(map(form.n_tiles, placed)))
    return _Layout(header, tensors, placed, tables, tables_at, checksums_at, index_at)


def _own_metadata(name: str) -> dict[str, str | int]:
    return {"general.alignment": form.PAGE, form.VERSION_KEY: form.VERSION, form.SOURCE_KEY: name}


def _index(source: ModelFile, layout: _Layout, name: str) -> bytes:
    """Return the header index. It holds the fingerprint, which depends on the size of the file and so on its length."""
    kept = {key: value for key, value in source.metadata.items() if not key.startswith(_OWN_KEYS)}
    model = source._replace(
        metadata=MappingProxyType(kept | _own_metadata(name)),
        tensors=MappingProxyType({info.name: info for info in layout.placed}),
        header_bytes=len(layout.header),
        fingerprint="0" * 32,
    )
    n_bytes = len(json.dumps(summary_of(model)))
    digest = blake2b(layout.header, digest_size=16).digest()
    fingerprint = fingerprint_of([(digest, layout.file_bytes(n_bytes))])
    return json.dumps(summary_of(model._replace(fingerprint=fingerprint))).encode()


def _write(file: BinaryIO, source: ModelFile, layout: _Layout, index: bytes, progress: Progress | None) -> None:
    digest = form.hasher(source.paths[0])
    file.write(layout.header)
    sums = _copy_tensors(file, source, layout, digest, progress)
    assert len(sums) == layout.n_checksums
    sections = []
    for kind, fmt, at, content in (
        (form.TOKENIZER, TABLES_FORMAT, layout.tables_at, b"".join(layout.tables)),
        (form.CHECKSUMS, 1, layout.checksums_at, sums.tobytes()),
        (form.INDEX, 1, layout.index_at, index),
    ):
        _pad(file, at)
        file.write(content)
        sections.append(form.Section(kind, fmt, at, len(content), digest(content)))
    file_bytes = layout.file_bytes(len(index))
    _pad(file, file_bytes - form.PAGE)
    file.write(form.footer(sections, file_bytes, digest))


def _copy_tensors(
    file: BinaryIO, source: ModelFile, layout: _Layout, digest: Callable[[Any], int], progress: Progress | None
) -> array[int]:
    """Write all tensors and return the checksums of their tiles."""
    sums = array("Q")
    done, total = 0, source.total_tensor_bytes
    blocks = [max(_BLOCK_BYTES // tile, 1) * tile for tile in (i.row_step * i.row_bytes for i in layout.tensors)]
    store, _ = open_store([str(path) for path in source.paths])
    try:
        with Buffer(span(form.PAGE - 1, max(blocks))) as buffer:
            for info, placed, block in zip(layout.tensors, layout.placed, blocks, strict=True):
                _pad(file, placed.offset)
                tile = info.row_step * info.row_bytes
                for start in range(0, info.n_bytes, block):
                    n_bytes = min(block, info.n_bytes - start)
                    first = store.read_into(info.file, info.offset + start, n_bytes, buffer.view, 0)
                    with buffer.view[first : first + n_bytes] as view:
                        sums.extend(digest(view[at : at + tile]) for at in range(0, n_bytes, tile))
                        file.write(view)
                    done += n_bytes
                    if progress is not None:
                        progress(done, total)
    finally:
        store.close()
    return sums


def _pad(file: BinaryIO, to: int) -> None:
    rest = to - file.tell()
    assert 0 <= rest < 2 * form.MAP_ALIGNMENT, rest
    file.write(bytes(rest))


@contextlib.contextmanager
def _with_room(target: Path, file_bytes: int) -> Iterator[BinaryIO]:
    """Give a file to write that gets its name when it is complete. Raises `PackError` where the disk is full."""
    remove_leftovers(target.parent, target.name)
    free = free_bytes(target.absolute().parent)
    if free < file_bytes:
        raise PackError(
            f"{target}: the pack needs {human(file_bytes)} and {human(free)} are free there; make room, "
            "or name an output on another disk"
        )
    with whole_or_nothing(target) as file:
        yield file


def _hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room, or name an output on another disk"
    return "check the folder and its permissions, or name another output"
