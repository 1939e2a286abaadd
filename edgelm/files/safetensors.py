"""Read the header of a safetensors file: every name, type, shape and place checked before it is used.

Nothing is allocated from a number that only the file vouches for. Knows nothing of models, or of several files.
Format: the README of safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from edgelm.errors import ModelFileError, ModelNotFound, UnsupportedModel
from edgelm.files.cursor import Cursor
from edgelm.files.errors import BadHeader, BadTensor, NotAModelFile, TruncatedFile
from edgelm.sizes import human

MAX_HEADER_BYTES = 16 * 2**20
"""The format allows 100 MB. The text of a tensor takes about 120 bytes, so this holds twice `MAX_TENSORS`; and what
Python makes of the text takes a multiple of it."""
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 255
MAX_DIMS = 8
_INT64_MAX = 2**63 - 1
_METADATA = "__metadata__"
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_FLAGS: int = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)


class Array(NamedTuple):
    """An array of a file: `dtype` as the format names it, `shape` with the slowest dimension first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Absolute, in bytes, in its file."""
    n_bytes: int


class Arrays(NamedTuple):
    """What one file holds, in the order in which it lies there. `digest` is a hash of the header."""

    path: Path
    arrays: tuple[Array, ...]
    header_bytes: int
    file_bytes: int
    digest: bytes


def read_arrays(path: Path) -> Arrays:
    """Return what a safetensors file holds. Reads its header only.

    Raises `ModelNotFound` if there is no file, `UnsupportedModel` for a type of numbers that edgelm does not know, and
    `NotAModelFile`, `TruncatedFile`, `BadHeader` or `BadTensor` for what is wrong with the file.
    """
    try:
        fd = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise ModelNotFound(f"{path}: there is no such file; check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = "check the path and its permissions"
        raise ModelFileError(path, f"the file cannot be opened: {reason}", hint) from None
    try:
        status = os.fstat(fd)
        if not os.path.isfile(path):
            raise NotAModelFile(path, "this is not an ordinary file", "download the file itself")
        with Cursor(fd, path, status.st_size) as cursor:
            return _read(cursor)
    finally:
        os.close(fd)


def _read(cursor: Cursor) -> Arrays:
    path = cursor.path
    if cursor.file_bytes == 0:
        raise NotAModelFile(path, "the file is empty (0 bytes)")
    if cursor.peek(64).lstrip().startswith(b"version https://git-lfs"):
        raise NotAModelFile(path, "this is a Git LFS pointer, not the model itself", "run `git lfs pull`")
    n = cursor.u64()
    if n > MAX_HEADER_BYTES:
        raise BadHeader(path, f"the header has {n} bytes, more than {human(MAX_HEADER_BYTES)}")
    if n > cursor.left:
        raise TruncatedFile(path, f"the header has {n} bytes, but only {human(cursor.left)} follow")
    described = _parsed(path, cursor.take(n))
    header_bytes = cursor.position
    if len(described) > MAX_TENSORS:
        raise BadHeader(path, f"the header names {len(described)} tensors, more than {MAX_TENSORS}")
    arrays = [_array(path, name, entry, header_bytes) for name, entry in described.items()]
    return Arrays(path, _placed(cursor, arrays), header_bytes, cursor.file_bytes, cursor.digest())


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    """Return the entries of all tensors by name."""
    if not text.startswith(b"{"):
        raise BadHeader(path, "the header is not a JSON object, so this is no safetensors file")
    try:
        described = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refused)
    except RecursionError:
        raise BadHeader(path, "the header is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, a name twice, a number of 10,000 digits
        raise BadHeader(path, f"the header is not sound JSON ({str(error)[:120]})") from None
    assert isinstance(described, dict)  # it begins with a brace
    notes = described.pop(_METADATA, {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise BadHeader(path, f"{_METADATA} is not an object of strings")
    return described


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, after in pairwise(sorted(name for name, _ in pairs)) if name == after)
        raise ValueError(f"{twice[:80]!r} stands twice")
    return found


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _array(path: Path, name: str, entry: Any, header_bytes: int) -> Array:
    if not 0 < len(name.encode("utf-8", "replace")) <= MAX_NAME_BYTES:
        raise BadTensor(path, f"the name {name[:40]!r} of a tensor is empty or longer than {MAX_NAME_BYTES} bytes")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise BadTensor(path, f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise UnsupportedModel(
            f"{path}: tensor {name!r} is of type {str(dtype)[:20]!r}, which this edgelm does not know; "
            "use a model in half precision, or quantized by MLX"
        )
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_count(size) for size in shape):
        raise BadTensor(path, f"tensor {name!r} has the shape {str(shape)[:80]}, not up to {MAX_DIMS} sizes")
    if 0 in shape:
        raise BadTensor(path, f"tensor {name!r} has a dimension of size 0")
    if not isinstance(place, list) or len(place) != 2 or not all(_is_count(at) for at in place):
        raise BadTensor(path, f"tensor {name!r} lies at {str(place)[:80]}, not between two offsets")
    n_bytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if n_bytes > _INT64_MAX:
        raise BadTensor(path, f"tensor {name!r} of shape {tuple(shape)} is larger than any file")
    if place[1] - place[0] != n_bytes:
        raise BadTensor(
            path, f"tensor {name!r} of shape {tuple(shape)} and type {dtype} takes {n_bytes} bytes, "
            f"its offsets {place[0]} to {place[1]} say otherwise"
        )  # fmt: skip
    return Array(name, dtype, tuple(shape), header_bytes + place[0], n_bytes)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _INT64_MAX


def _placed(cursor: Cursor, arrays: list[Array]) -> tuple[Array, ...]:
    """Return the arrays in file order: one after the other, without holes, to the end of the file."""
    path, end, previous = cursor.path, cursor.position, ""
    ordered = sorted(arrays, key=lambda array: array.offset)
    for array in ordered:
        if array.offset < end:
            raise BadTensor(path, f"tensors {previous!r} and {array.name!r} overlap")
        if array.offset > end:
            raise BadTensor(path, f"{array.offset - end} bytes before tensor {array.name!r} belong to no tensor")
        end, previous = array.offset + array.n_bytes, array.name
    if end > cursor.file_bytes:
        raise TruncatedFile(
            path,
            f"the file ends after {human(cursor.file_bytes)} ({cursor.file_bytes} bytes), "
            f"but its tensors reach to {end} bytes",
        )
    if end < cursor.file_bytes:
        raise BadHeader(path, f"{cursor.file_bytes - end} bytes at the end of the file belong to no tensor")
    return tuple(ordered)
