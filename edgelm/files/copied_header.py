"""The header of a GGUF file made of another: its keys byte for byte, but for those that the new file decides."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgelm.files.gguf import read_part
from edgelm.files.model import TensorInfo

_UINT32, _STRING = 4, 8


def copied_header(
    source: Path, tensors: Sequence[TensorInfo], own: Mapping[str, str | int], dropped: tuple[str, ...]
) -> bytes:
    """Return the header of a file with these tensors, whose offsets count from the end of the padded header.

    `source` is the file, or the first part, whose keys are taken over but for those that begin like one of `dropped`;
    `own` keys (text, or numbers of 32 bits) come after them. Raises what opening the source raises.
    """
    part = read_part(source)
    with source.open("rb") as file:
        raw = file.read(part.header_bytes)
    keys = [raw[start:end] for key, (start, end) in part.spans.items() if not key.startswith(dropped)]
    for key, value in own.items():
        kind = _STRING if isinstance(value, str) else _UINT32
        keys.append(_string(key) + struct.pack("<I", kind) + _value(value))
    table = [
        _string(info.name)
        + struct.pack(f"<I{len(info.shape)}QIQ", len(info.shape), *info.shape, info.type, info.offset)
        for info in tensors
    ]
    return b"".join((b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys)), *keys, *table))


def _value(value: str | int) -> bytes:
    return _string(value) if isinstance(value, str) else struct.pack("<I", value)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw
