"""Many strings as one run of bytes and an array of offsets: no Python object per string.

Knows nothing about where the bytes came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class StringArray(Sequence[str]):
    """An immutable sequence of strings, decoded one by one when asked for.

    `data` holds all bytes in a row; string `i` is `data[offsets[i]:offsets[i + 1]]`, so `offsets` (uint32) has one
    entry more than there are strings. Bytes that are not UTF-8 decode to U+FFFD; `raw` gives them unchanged.
    """

    __slots__ = ("data", "offsets")

    def __init__(self, data: bytes | bytearray, offsets: NDArray[np.uint32]) -> None:
        assert offsets[-1] == len(data)
        self.data, self.offsets = data, offsets

    @classmethod
    def of(cls, strings: Sequence[str | bytes]) -> StringArray:
        """Return the array that holds `strings`."""
        raw = [s.encode() if isinstance(s, str) else s for s in strings]
        offsets = np.zeros(len(raw) + 1, dtype=np.uint32)
        np.cumsum([len(s) for s in raw], out=offsets[1:])
        return cls(b"".join(raw), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def raw(self, index: int) -> bytes:
        """Return the bytes of string `index`; negative indices count from the end."""
        n = len(self)
        if not -n <= index < n:
            raise IndexError(f"string {index} of {n}")
        index %= n
        return bytes(self.data[int(self.offsets[index]) : int(self.offsets[index + 1])])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.raw(index).decode("utf-8", "replace")

    def iter_raw(self) -> Iterator[bytes]:
        """Yield the bytes of each string."""
        start, data = 0, self.data
        for step in range(1, len(self.offsets), _STEP):
            for end in self.offsets[step : step + _STEP].tolist():
                yield bytes(data[start:end])
                start = end

    def __iter__(self) -> Iterator[str]:
        for raw in self.iter_raw():
            yield raw.decode("utf-8", "replace")

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, StringArray):
            return NotImplemented
        return self.data == other.data and np.array_equal(self.offsets, other.offsets)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StringArray({len(self)} strings, {len(self.data)} bytes)"


_STEP = 4096  # offsets turned into Python ints at a time
