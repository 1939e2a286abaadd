"""Write small GGUF files for tests: metadata, a tensor table, data; whole or split.

Writes what it is told, also nonsense within the format; checks only that the data has the size that its type and shape
imply. One tensor's data is in memory at a time if it is given as a function.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.strings import StringArray

ALIGNMENT = 32

_STRING, _ARRAY = 8, 9
_KIND_OF_DTYPE = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}


class TensorData(NamedTuple):
    """A tensor to write; `shape` has the fastest dimension first, `data` is bytes or a function that makes them."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: bytes | Callable[[], bytes]

    @property
    def n_bytes(self) -> int:
        """Bytes that type and shape imply."""
        return row_bytes(self.type, self.shape[0]) * math.prod(self.shape[1:])


def write_gguf(
    path: Path | str, metadata: Mapping[str, Any], tensors: Sequence[TensorData | tuple[Any, ...]], *, version: int = 3
) -> Path:
    """Write one GGUF file and return its path.

    Python values become: int uint32 (int32, int64 or uint64 where they must), float float32, list of int int32,
    list of float float32; NumPy scalars and arrays keep their type. `general.alignment` in the metadata is obeyed.
    """
    items = [TensorData(*tensor) for tensor in tensors]
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    with Path(path).open("wb") as file:
        file.write(header_bytes(metadata, items, version=version))
        for item in items:
            _pad(file, alignment)
            data = item.data() if callable(item.data) else item.data
            assert len(data) == item.n_bytes, f"{item.name}: {len(data)} bytes, {item.n_bytes} expected"
            file.write(data)
        _pad(file, alignment)
    return Path(path)


def write_split_gguf(
    path: Path | str, metadata: Mapping[str, Any], tensors: Sequence[TensorData | tuple[Any, ...]], n_parts: int
) -> list[Path]:
    """Write `n_parts` files named after `path` (`NAME.gguf` gives `NAME-00001-of-00003.gguf`); return their paths.

    Tensors are dealt out in order, evenly by number. Only the first part holds the metadata.
    """
    path = Path(path)
    per_part = -(-len(tensors) // n_parts)
    paths = []
    for part in range(n_parts):
        split = {
            "split.no": np.uint16(part),
            "split.count": np.uint16(n_parts),
            "split.tensors.count": np.int32(len(tensors)),
        }
        target = path.with_name(f"{path.stem}-{part + 1:05d}-of-{n_parts:05d}.gguf")
        mine = tensors[part * per_part : (part + 1) * per_part]
        paths.append(write_gguf(target, {**(metadata if part == 0 else {}), **split}, mine))
    return paths


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[TensorData], *, version: int = 3) -> bytes:
    """Return the header alone, without the padding after it."""
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    out = [b"GGUF", struct.pack("<IQQ", version, len(tensors), len(metadata))]
    for key, value in metadata.items():
        out += [string(key), _typed(value)]
    offset = 0
    for item in tensors:
        dims = struct.pack(f"<I{len(item.shape)}Q", len(item.shape), *item.shape)
        out += [string(item.name), dims, struct.pack("<IQ", item.type, offset)]
        offset += -(-item.n_bytes // alignment) * alignment
    return b"".join(out)


def string(text: str | bytes) -> bytes:
    """Return a GGUF string: its length in eight bytes, then its bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    if isinstance(value, str | bytes):
        return struct.pack("<I", _STRING) + string(value)
    if isinstance(value, StringArray):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(string, value.iter_raw()))
    if isinstance(value, list | tuple) and all(isinstance(item, str | bytes) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(string, value))
    if isinstance(value, list | tuple):
        value = np.asarray(value)
        value = value.astype({"f": "<f4", "i": "<i4", "b": "?"}[value.dtype.kind])
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _kind(value.dtype), len(value)) + value.tobytes()
    if not isinstance(value, np.generic):
        value = _scalar(value)
    return struct.pack("<I", _kind(value.dtype)) + bytes(value.tobytes())


def _kind(dtype: np.dtype[Any]) -> int:
    return _KIND_OF_DTYPE[dtype.newbyteorder("<").str[1:]]


def _scalar(value: bool | int | float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    fits = (kind for kind in (np.uint32, np.int32, np.int64, np.uint64) if _fits(value, kind))
    return next(fits)(value)


def _fits(value: int, kind: type[np.integer[Any]]) -> bool:
    info = np.iinfo(kind)
    return int(info.min) <= value <= int(info.max)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))
