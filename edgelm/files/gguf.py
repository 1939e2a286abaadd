"""Open a GGUF model: one file, or the parts of a split one, as one table of tensors.

Reads headers only, keeps no file open, and reads no weights.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from edgelm.errors import ModelFileError, ModelNotFound
from edgelm.files.cursor import Cursor
from edgelm.files.errors import (
    BadHeader,
    DuplicatePart,
    MismatchedPart,
    MissingPart,
    NotAModelFile,
    NotFirstPart,
)
from edgelm.files.header import Header, read_header
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.files.sniff import HEAD_BYTES, check_magic
from edgelm.hashing import blake2b

MAX_PARTS = 65_535
_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_BINARY: int = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read the header of the GGUF model at `path`; for a split model, the path of its first part.

    Raises `ModelNotFound` if there is no file, `UnsupportedModel` for a version, byte order or tensor type that
    edgelm does not read, and a subclass of `ModelFileError` that says what is wrong with the file.
    """
    first = read_part(Path(path))
    n_parts = _count(first, "split.count", 1)
    headers = [first] if n_parts <= 1 else _read_split(first, n_parts)
    metadata = first.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise BadHeader(first.path, "the header does not name an architecture (general.architecture)")
    return ModelFile(
        paths=tuple(header.path for header in headers),
        metadata=MappingProxyType(metadata),
        tensors=MappingProxyType(_join_tensors(headers)),
        architecture=architecture,
        header_bytes=sum(header.header_bytes for header in headers),
        file_bytes=tuple(header.file_bytes for header in headers),
        fingerprint=fingerprint_of((header.digest, header.file_bytes) for header in headers),
    )


def fingerprint_of(parts: Iterable[tuple[bytes, int]]) -> str:
    """Return the key of a model whose parts have headers of these digests, and these sizes."""
    digest = blake2b(digest_size=16)
    for header_digest, file_bytes in parts:
        digest.update(header_digest + file_bytes.to_bytes(8, "little"))
    return digest.hexdigest()


def read_part(path: Path) -> Header:
    """Return the header of one file. Raises what `open_model` raises."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise NotAModelFile(path, "this is a folder, not a model file", _folder_hint(path))
        if not stat.S_ISREG(status.st_mode):
            raise NotAModelFile(path, "this is a device or a pipe, not a file", "give the path of a GGUF file")
        fd = os.open(path, os.O_RDONLY | _BINARY)
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: there is no such file; check the path, or see `edgelm list`") from None
    except (OSError, ValueError) as error:  # a path with a zero byte is a ValueError
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(
            path, f"the file cannot be opened: {reason}", "check the path and its permissions"
        ) from None
    try:
        with Cursor(fd, path, os.fstat(fd).st_size) as cursor:
            check_magic(path, cursor.peek(HEAD_BYTES), cursor.file_bytes)
            return read_header(cursor)
    finally:
        os.close(fd)


def _folder_hint(path: Path) -> str:
    try:
        found = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(".gguf"))
    except OSError:
        found = []
    if not found:
        return "it holds no .gguf file; give the path of one"
    return f"give the path of a file in it, such as {path / found[0]}"


def _count(header: Header, key: str, default: int | None = None) -> int:
    value = header.metadata.get(key, default)
    if value is None:
        raise MismatchedPart(header.path, f"the header lacks {key}, which the other parts have")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2**31:
        raise BadHeader(header.path, f"{key} is {str(value)[:40]}, not a count")
    return value


def _read_split(first: Header, n_parts: int) -> list[Header]:
    """Read the other parts and return all of them in order."""
    name = _PART_NAME.fullmatch(first.path.name)
    if name is None:
        raise MismatchedPart(
            first.path,
            f"the header says this is one of {n_parts} parts, but the name lacks -00001-of-{n_parts:05d}",
            "give the parts their names back",
        )
    if n_parts > MAX_PARTS or int(name["count"]) != n_parts:
        raise MismatchedPart(
            first.path, f"the header says the model has {n_parts} parts, the name says {int(name['count'])}"
        )
    paths = [first.path.with_name(f"{name['stem']}-{k:05d}-of-{n_parts:05d}.gguf") for k in range(1, n_parts + 1)]
    if _count(first, "split.no") != 0 or int(name["number"]) != 1:
        if int(name["number"]) == 1:
            raise MismatchedPart(first.path, f"the name says part 1, the header part {_count(first, 'split.no') + 1}")
        raise NotFirstPart(first.path, f"this is part {int(name['number'])} of {n_parts}", f"open {paths[0]}")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise MissingPart(
            first.path, f"{len(missing)} of {n_parts} parts are missing: {shown}", "download all parts to one folder"
        )
    headers = [first]
    for number, path in enumerate(paths[1:], start=1):
        header = read_part(path)
        _check_part(header, number, n_parts, first)
        headers.append(header)
    return headers


def _check_part(header: Header, number: int, n_parts: int, first: Header) -> None:
    count, actual = _count(header, "split.count"), _count(header, "split.no")
    if count != n_parts:
        raise MismatchedPart(header.path, f"the header says the model has {count} parts, part 1 says {n_parts}")
    if actual != number:
        kind = DuplicatePart if actual < number else MismatchedPart
        raise kind(header.path, f"the name says part {number + 1}, the header part {actual + 1}")
    theirs, ours = header.metadata.get("general.architecture"), first.metadata.get("general.architecture")
    if theirs is not None and theirs != ours:
        raise MismatchedPart(header.path, f"this part is of a {theirs!r} model, part 1 of a {ours!r} model")
    if _count(header, "split.tensors.count", 0) != _count(first, "split.tensors.count", 0):
        raise MismatchedPart(header.path, "split.tensors.count differs from part 1: this part is of another model")


def _join_tensors(headers: list[Header]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for index, header in enumerate(headers):
        for entry in header.tensors:
            if entry.name in tensors:
                raise DuplicatePart(
                    header.path, f"the tensor {entry.name!r} is also in {_name_of(headers, tensors, entry.name)}"
                )
            tensors[entry.name] = TensorInfo(entry.name, entry.type, entry.shape, index, entry.offset, entry.n_bytes)
    promised = _count(headers[0], "split.tensors.count", len(tensors)) if len(headers) > 1 else len(tensors)
    if promised != len(tensors):
        raise MismatchedPart(headers[0].path, f"the parts promise {promised} tensors and hold {len(tensors)}")
    return tensors


def _name_of(headers: list[Header], tensors: Mapping[str, TensorInfo], name: str) -> str:
    return headers[tensors[name].file].path.name
