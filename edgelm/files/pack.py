"""The sections that edgelm appends to a GGUF file to make it a pack, each with a checksum: `docs/format.md`.

Finds them from the last page of the file, checks them, and says what is damaged. Knows neither how tensors are ordered
nor what the tokenizer's tables mean; reads no weights.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgelm.errors import UnsupportedModel
from edgelm.files.errors import DamagedPack
from edgelm.files.model import ROW_STEP, Checksums, ModelFile, TensorInfo
from edgelm.files.summary import restored

VERSION = 1
VERSION_KEY, SOURCE_KEY = "edgelm.pack.version", "edgelm.pack.source"
PAGE = 4096
"""Alignment of every tensor, and the size of the footer."""
MAP_ALIGNMENT = 65_536
"""Alignment of what is mapped: the coarsest that a system asks for."""
TILE_BYTES = 128 * 1024
"""What one checksum covers, or a little more: hashing and telling rows apart cost nothing at this size."""
INDEX, TOKENIZER, CHECKSUMS = 1, 2, 3
"""Kinds of sections; a reader passes over kinds that it does not know."""

_NAMES = {INDEX: "header index", TOKENIZER: "tokenizer section", CHECKSUMS: "checksum table"}
_MAGIC = b"edgelmPK"
_HEAD = struct.Struct("<8sIIQ")  # magic, version, number of sections, bytes of the file
_ENTRY = struct.Struct("<IIQQQ")  # kind, its own format number, offset, bytes, checksum
_SUM = struct.Struct("<Q")
_MOST_SECTIONS = 64
_MOST_BYTES = {INDEX: 64 << 20, TOKENIZER: 1 << 30, CHECKSUMS: 1 << 30}
_FLAGS: int = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class Section(NamedTuple):
    """Where a section lies. `format` is a number of its own, so that one may change without the others."""

    kind: int
    format: int
    offset: int
    n_bytes: int
    checksum: int


class Pack(NamedTuple):
    """What makes an opened model a pack: its sections."""

    path: Path
    sections: Mapping[int, Section]

    def has_tables(self, fmt: int) -> bool:
        """Say whether the tokenizer's tables are here in this format."""
        return TOKENIZER in self.sections and self.sections[TOKENIZER].format == fmt

    def tokenizer_tables(self, fmt: int) -> mmap.mmap | bytes | None:
        """Return the checked tables of this format, mapped where the system can; None if the pack has others.

        Raises `DamagedPack`.
        """
        if not self.has_tables(fmt):
            return None
        section = self.sections[TOKENIZER]
        with open(self.path, "rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size < section.offset + section.n_bytes:
                raise _damaged(self.path, TOKENIZER, "lies past the end of the file")
            content: mmap.mmap | bytes
            try:
                content = mmap.mmap(file.fileno(), section.n_bytes, access=mmap.ACCESS_READ, offset=section.offset)
            except OSError:  # a file system that maps nothing
                content = _read(file.fileno(), section.offset, section.n_bytes)
        _check(self.path, section, content)  # makes every page resident, before memory is measured
        return content


def hasher(path: object) -> Callable[[Any], int]:
    """Return XXH3-64. Raises `UnsupportedModel`, naming `path`, where the library is missing."""
    try:
        from xxhash import xxh3_64
    except ImportError as error:
        raise UnsupportedModel(
            f"{path}: this is a pack, and its checksums need the xxhash library, which cannot be imported here "
            f"({error}); run `pip install xxhash`, or use the GGUF file that the pack was made of"
        ) from error
    # not xxh3_64_intdigest, which keeps the interpreter's lock: readers would hold up whoever computes
    return lambda content: xxh3_64(content).intdigest()


def tile_rows(n_rows: int, row_bytes: int) -> int:
    """Return how many rows of a matrix one checksum covers: whole pages if that takes few rows, at most all."""
    step = math.lcm(ROW_STEP, PAGE // math.gcd(PAGE, row_bytes))
    if step * row_bytes > 2 * TILE_BYTES:
        step = ROW_STEP
    return min(-(-TILE_BYTES // (step * row_bytes)) * step, n_rows)


def n_tiles(info: TensorInfo) -> int:
    """Return the number of checksums of a tensor."""
    return -(-info.n_rows // info.row_step)


def footer(sections: Sequence[Section], file_bytes: int, digest: Callable[[Any], int], magic: bytes = _MAGIC) -> bytes:
    """Return the last page of a pack, or of another file that is made of sections."""
    assert len(sections) <= _MOST_SECTIONS
    entries = b"".join(_ENTRY.pack(s.kind, s.format, s.offset, s.n_bytes, s.checksum) for s in sections)
    page = (_HEAD.pack(magic, VERSION, len(sections), file_bytes) + entries).ljust(PAGE - _SUM.size, b"\0")
    return page + _SUM.pack(digest(page))


class Sections(NamedTuple):
    """What the footer of a file says, and its index (`table`) and checksums, all checked."""

    file_bytes: int
    sections: Mapping[int, Section]
    table: bytes
    checksums: bytes


def open_pack(path: Path) -> ModelFile | None:
    """Return the model of a pack, or None for any other file, or none at all. Reads neither header nor vocabulary.

    Raises `DamagedPack` naming the part, `UnsupportedModel` for a pack of a newer edgelm.
    """
    found = read_sections(path)
    return _model(path, found) if found is not None else None


def read_sections(path: Path, magic: bytes = _MAGIC) -> Sections | None:
    """Return what a file with this magic in its footer ends with; None for any other file. Raises as `open_pack`."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None  # a pipe would be waited for
        fd = os.open(path, _FLAGS)
    except (OSError, ValueError):
        return None  # whoever opens it as a model says why
    try:
        file_bytes = os.fstat(fd).st_size
        if file_bytes < 2 * PAGE:
            return None
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # read ahead, it would stay in the page cache
        page = _read(fd, file_bytes - PAGE, PAGE)
        if not page.startswith(magic):
            return None
        sections = _sections(path, page, file_bytes)
        content = {kind: _read(fd, sections[kind].offset, sections[kind].n_bytes) for kind in (INDEX, CHECKSUMS)}
    except OSError:
        return None
    finally:
        os.close(fd)
    for kind in content:
        _check(path, sections[kind], content[kind])
    return Sections(file_bytes, sections, content[INDEX], content[CHECKSUMS])


def refuse_lost_footer(model: ModelFile) -> None:
    """Raise `DamagedPack` if a file that was read as plain GGUF says that it is a pack."""
    if VERSION_KEY in model.metadata:
        raise DamagedPack(model.paths[0], "the footer of the pack (its last 4096 bytes) is missing or overwritten")


def _sections(path: Path, page: bytes, file_bytes: int) -> dict[int, Section]:
    if hasher(path)(page[: -_SUM.size]) != _SUM.unpack(page[-_SUM.size :])[0]:
        raise DamagedPack(path, "the footer of the pack (its last 4096 bytes) does not match its checksum")
    _, version, n_sections, promised = _HEAD.unpack_from(page)
    if version != VERSION:
        raise UnsupportedModel(
            f"{path}: this is a pack of version {version}, and this edgelm reads version {VERSION}; "
            "use a newer edgelm, or the GGUF file that the pack was made of"
        )
    if promised != file_bytes:
        raise DamagedPack(path, f"the footer of the pack promises {promised} bytes, the file has {file_bytes}")
    if n_sections > _MOST_SECTIONS:
        raise DamagedPack(path, f"the footer of the pack promises {n_sections} sections, more than {_MOST_SECTIONS}")
    found: dict[int, Section] = {}
    for number in range(n_sections):
        section = Section(*_ENTRY.unpack_from(page, _HEAD.size + number * _ENTRY.size))
        if section.kind in found:
            raise _damaged(path, section.kind, "is listed twice in the footer")
        if not 0 < section.n_bytes <= _MOST_BYTES.get(section.kind, file_bytes):
            raise _damaged(path, section.kind, f"has {section.n_bytes} bytes, which no model needs")
        alignment = MAP_ALIGNMENT if section.kind == TOKENIZER else PAGE
        if section.offset % alignment or section.offset + section.n_bytes > file_bytes - PAGE:
            raise _damaged(path, section.kind, "does not lie, aligned, between the tensors and the footer")
        found[section.kind] = section
    for kind in (INDEX, CHECKSUMS):
        if kind not in found or found[kind].format != 1:
            raise _damaged(path, kind, "is missing")
    return found


def _model(path: Path, found: Sections) -> ModelFile:
    try:
        model = restored(json.loads(found.table), (path,), (found.file_bytes,))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise _damaged(path, INDEX, f"makes no sense ({error})") from error
    tensors = tuple(model.tensors.values())
    needed = sum(map(n_tiles, tensors)) * _SUM.size
    if needed != len(found.checksums):
        raise _damaged(path, CHECKSUMS, f"has {len(found.checksums)} bytes, the tensors need {needed}")
    checksums = (Checksums(0, tensors, memoryview(found.checksums)),)
    return model._replace(pack=Pack(path, found.sections), checksums=checksums)


def _read(fd: int, offset: int, n_bytes: int) -> bytes:
    os.lseek(fd, offset, os.SEEK_SET)
    chunks: list[bytes] = []
    while n_bytes and (chunk := os.read(fd, n_bytes)):
        chunks.append(chunk)
        n_bytes -= len(chunk)
    return b"".join(chunks)


def _check(path: Path, section: Section, content: bytes | mmap.mmap) -> None:
    if hasher(path)(content) != section.checksum:
        raise _damaged(path, section.kind, "does not match its checksum")


def _damaged(path: Path, kind: int, fact: str) -> DamagedPack:
    return DamagedPack(path, f"the {_NAMES.get(kind, f'section of kind {kind}')} of the pack {fact}")
