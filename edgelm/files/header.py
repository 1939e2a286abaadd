"""Read the header of one GGUF file: metadata and tensor table, every number checked before it is used.

Nothing is allocated from a number that only the file vouches for: counts are compared with the bytes that are left,
bytes with the size of the file. Knows nothing about split models or architectures.
Format: `docs/gguf.md` of ggml, versions 2 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import UnsupportedModel
from edgelm.files.cursor import Cursor
from edgelm.files.errors import BadHeader, BadTensor, TruncatedFile
from edgelm.files.ggml_types import TensorType, row_bytes, tensor_type
from edgelm.sizes import human

MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_TENSOR_NAME_BYTES = 127
MAX_STRING_BYTES = 64 * 2**20
MAX_ARRAY_ITEMS = 2**22
MAX_DIMS = 4
MAX_ALIGNMENT = 2**20
DEFAULT_ALIGNMENT = 32

_MIN_KEY_BYTES = 8 + 4 + 1  # length of the name, value type, value; an empty name is told apart later
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # length, name, dimensions, one dimension, type, offset
_INT64_MAX = 2**63 - 1

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"), 1: np.dtype("<i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), 6: np.dtype("<f4"), _BOOL: np.dtype("?"), 10: np.dtype("<u8"), 11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A line of the tensor table; `offset` is absolute in its file, `shape` has the fastest dimension first."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one file says about itself. `digest` is a hash of the header's bytes, `spans` says where each key lies."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorEntry, ...]
    header_bytes: int
    file_bytes: int
    digest: bytes
    spans: dict[str, tuple[int, int]]


def read_header(cursor: Cursor) -> Header:
    """Read and check the header of a GGUF file (little-endian, version 2 or 3) from its beginning.

    Raises `TruncatedFile`, `BadHeader`, `BadTensor` or `UnsupportedModel`.
    """
    path = cursor.path
    cursor.take(4)  # the magic: whoever opened the file has looked at it
    version = _version(cursor)
    n_tensors, n_keys = cursor.u64(), cursor.u64()
    _check_count(cursor, "tensors", n_tensors, MAX_TENSORS, _MIN_TENSOR_BYTES)
    _check_count(cursor, "metadata keys", n_keys, MAX_KEYS, _MIN_KEY_BYTES)
    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for index in range(n_keys):
        start = cursor.position
        key = _key(cursor, index)
        if key in metadata:
            raise BadHeader(path, f"the metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, key)
        spans[key] = (start, cursor.position)
    alignment = _alignment(path, metadata)
    relative = _tensor_table(cursor, n_tensors)
    header_bytes = cursor.position
    data_start = -(-header_bytes // alignment) * alignment
    tensors = _placed(path, relative, data_start, alignment, cursor.file_bytes)
    return Header(path, version, metadata, tensors, header_bytes, cursor.file_bytes, cursor.digest(), spans)


def _version(cursor: Cursor) -> int:
    version = cursor.u32()
    if version in (2, 3):
        return version
    if version == 1:
        raise UnsupportedModel(f"{cursor.path}: GGUF version 1 is no longer read; convert the model again")
    if version and version & 0xFFFF == 0:
        raise UnsupportedModel(
            f"{cursor.path}: this GGUF file is big-endian; convert it with gguf-convert-endian, or get the usual one"
        )
    if version == 0:
        raise BadHeader(cursor.path, "the header says GGUF version 0")
    raise UnsupportedModel(f"{cursor.path}: GGUF version {version} is newer than this edgelm; use a newer edgelm")


def _check_count(cursor: Cursor, what: str, n: int, limit: int, item_bytes: int) -> None:
    if n > limit:
        raise BadHeader(cursor.path, f"the header promises {n} {what}, more than the {limit} that are allowed")
    if n * item_bytes > cursor.left:
        raise TruncatedFile(cursor.path, f"the header promises {n} {what}, but only {human(cursor.left)} follow")


def _key(cursor: Cursor, index: int) -> str:
    n = cursor.u64()
    if n == 0:
        raise BadHeader(cursor.path, f"the name of metadata key {index} is empty")
    if n > MAX_KEY_BYTES:
        raise BadHeader(cursor.path, f"the name of metadata key {index} has {n} bytes, more than {MAX_KEY_BYTES}")
    try:
        return cursor.take(n).decode()
    except UnicodeDecodeError:
        raise BadHeader(cursor.path, f"the name of metadata key {index} is not UTF-8") from None


def _value(cursor: Cursor, key: str) -> Any:
    kind = cursor.u32()
    if kind == _STRING:
        n = cursor.u64()
        if n > MAX_STRING_BYTES:
            raise BadHeader(cursor.path, f"the string {key!r} has {n} bytes, more than {human(MAX_STRING_BYTES)}")
        return cursor.take(n).decode("utf-8", "replace")
    if kind == _ARRAY:
        return _array(cursor, key)
    dtype = _dtype(cursor, key, kind)
    raw = cursor.take(dtype.itemsize)
    if kind == _BOOL and raw[0] > 1:
        raise BadHeader(cursor.path, f"the truth value {key!r} is {raw[0]}, neither 0 nor 1")
    return np.frombuffer(raw, dtype)[0].item()


def _dtype(cursor: Cursor, key: str, kind: int) -> np.dtype[Any]:
    dtype = _SCALARS.get(kind)
    if dtype is None:
        raise BadHeader(cursor.path, f"the value of {key!r} has the unknown type {kind}")
    return dtype


def _array(cursor: Cursor, key: str) -> Any:
    kind, n = cursor.u32(), cursor.u64()
    if kind == _ARRAY:
        raise BadHeader(cursor.path, f"{key!r} is an array of arrays, which no model needs", "convert the model again")
    item_bytes = 8 if kind == _STRING else _dtype(cursor, key, kind).itemsize
    if n > MAX_ARRAY_ITEMS:
        raise BadHeader(cursor.path, f"the array {key!r} has {n} items, more than the {MAX_ARRAY_ITEMS} allowed")
    if n * item_bytes > cursor.left:
        raise TruncatedFile(cursor.path, f"the array {key!r} promises {n} items, but only {human(cursor.left)} follow")
    if kind == _STRING:
        return cursor.strings(n, MAX_STRING_BYTES, key)
    raw = cursor.read_array(n, np.dtype("u1") if kind == _BOOL else _SCALARS[kind])
    if kind == _BOOL:
        if n and raw.max() > 1:
            raise BadHeader(cursor.path, f"the array {key!r} holds truth values that are neither 0 nor 1")
        return raw.view(np.bool_)
    return raw


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(alignment, bool) or not isinstance(alignment, int):
        raise BadHeader(path, f"general.alignment is {type(alignment).__name__}, not a whole number")
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise BadHeader(path, f"general.alignment is {alignment}, not a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _tensor_table(cursor: Cursor, n_tensors: int) -> list[TensorEntry]:
    """Read the table; the offsets are still relative to the start of the data."""
    entries: list[TensorEntry] = []
    names: set[str] = set()
    for index in range(n_tensors):
        name = _tensor_name(cursor, index)
        if name in names:
            raise BadTensor(cursor.path, f"two tensors are called {name!r}")
        names.add(name)
        shape = _shape(cursor, name)
        try:
            kind = tensor_type(cursor.u32())
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{cursor.path}: tensor {name!r}: {error}") from None
        if shape[0] % kind.block_size:
            raise BadTensor(
                cursor.path,
                f"a row of tensor {name!r} has {shape[0]} weights, not a whole number of "
                f"{kind.name} blocks of {kind.block_size}",
            )
        entries.append(TensorEntry(name, kind, shape, cursor.u64(), math.prod(shape[1:]) * row_bytes(kind, shape[0])))
    return entries


def _tensor_name(cursor: Cursor, index: int) -> str:
    n = cursor.u64()
    if not 0 < n <= MAX_TENSOR_NAME_BYTES:
        raise BadTensor(cursor.path, f"the name of tensor {index} has {n} bytes, not 1 to {MAX_TENSOR_NAME_BYTES}")
    try:
        return cursor.take(n).decode()
    except UnicodeDecodeError:
        raise BadTensor(cursor.path, f"the name of tensor {index} is not UTF-8") from None


def _shape(cursor: Cursor, name: str) -> tuple[int, ...]:
    n_dims = cursor.u32()
    if not 0 < n_dims <= MAX_DIMS:
        raise BadTensor(cursor.path, f"tensor {name!r} has {n_dims} dimensions, not 1 to {MAX_DIMS}")
    shape = tuple(cursor.u64() for _ in range(n_dims))
    n_weights = 1
    for size in shape:
        n_weights *= size
        if size == 0:
            raise BadTensor(cursor.path, f"tensor {name!r} has a dimension of size 0")
        if n_weights > _INT64_MAX // 8:  # the widest type has 8 bytes per weight
            raise BadTensor(cursor.path, f"tensor {name!r} of shape {shape} is larger than any file")
    return shape


def _placed(
    path: Path, relative: list[TensorEntry], data_start: int, alignment: int, file_bytes: int
) -> tuple[TensorEntry, ...]:
    """Return the entries with absolute offsets, each aligned, inside the file, and clear of the others."""
    placed = []
    for entry in relative:
        if entry.offset % alignment:
            raise BadTensor(path, f"tensor {entry.name!r} starts at {entry.offset}, not at a multiple of {alignment}")
        placed.append(TensorEntry(entry.name, entry.type, entry.shape, data_start + entry.offset, entry.n_bytes))
    end = data_start
    previous = ""
    for entry in sorted(placed, key=lambda e: e.offset):
        if entry.offset < end:
            raise BadTensor(path, f"tensors {previous!r} and {entry.name!r} overlap")
        end, previous = entry.offset + entry.n_bytes, entry.name
    if end > file_bytes:
        raise TruncatedFile(
            path, f"the file ends after {human(file_bytes)} ({file_bytes} bytes), but its tensors reach to {end} bytes"
        )
    return tuple(placed)
