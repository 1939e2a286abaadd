"""Walk through the beginning of a file whose length is not known before it has been read.

Reads in windows, never past the size of the file, hashes what was walked over, and leaves the page cache as it was.
Knows integers, strings and arrays; not what they mean.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ModelFileError
from edgelm.files.errors import BadHeader, TruncatedFile
from edgelm.files.strings import StringArray
from edgelm.hashing import blake2b
from edgelm.sizes import human

MAX_HEADER_BYTES = 256 * 2**20
WINDOW_BYTES = 256 * 2**10

_RWF_DONTCACHE = 0x80  # Linux 6.14: drop the pages that this very read brought into the page cache
_LARGEST_PAGE_BYTES = 65_536  # a page that is dropped in part is kept
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


class Cursor:
    """A position in a file, with the bytes behind it in a window of bounded size."""

    def __init__(self, fd: int, path: Path, file_bytes: int) -> None:
        self.path, self.file_bytes = path, file_bytes
        self._fd = fd
        self._window = b""
        self._at = 0  # the position inside the window
        self._read_bytes = 0  # how much of the file has been read: the end of the window
        self._hash = blake2b(digest_size=16)
        self._flags = _RWF_DONTCACHE if sys.platform == "linux" else 0

    def __enter__(self) -> Self:
        if hasattr(os, "posix_fadvise"):
            # what the kernel reads ahead stays in the page cache, in spite of the flag and past the header
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._window = b""
        if not self._flags and hasattr(os, "posix_fadvise"):
            # cached pages of the header are memory that nobody budgeted, and it is not read again
            os.posix_fadvise(self._fd, 0, self._read_bytes + _LARGEST_PAGE_BYTES, os.POSIX_FADV_DONTNEED)

    @property
    def position(self) -> int:
        """Bytes walked over so far."""
        return self._read_bytes - len(self._window) + self._at

    @property
    def left(self) -> int:
        """Bytes of the file after this position."""
        return self.file_bytes - self.position

    def digest(self) -> bytes:
        """Return the hash of everything walked over."""
        state = self._hash.copy()
        state.update(memoryview(self._window)[: self._at])
        return state.digest()

    def peek(self, n: int) -> bytes:
        """Return the next `n` bytes, or as many as there are, without walking over them."""
        n = min(n, self.left)
        if self._at + n > len(self._window):
            self._fill(n)
        return self._window[self._at : self._at + n]

    def take(self, n: int) -> bytes:
        """Return the next `n` bytes. Raises `TruncatedFile` if fewer are left."""
        if self._at + n > len(self._window):
            self._fill(n)
        start = self._at
        self._at += n
        return self._window[start : start + n]

    def u32(self) -> int:
        """Return the next four bytes as a number."""
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        """Return the next eight bytes as a number."""
        return int(_U64.unpack(self.take(8))[0])

    def read_array(self, n: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the next `n` numbers; the caller has compared `n` with `left`."""
        array = np.empty(n, dtype)
        view = array.view(np.uint8).data
        done = 0
        while done < len(view):
            step = min(len(view) - done, WINDOW_BYTES)
            view[done : done + step] = self.take(step)
            done += step
        return array

    def strings(self, n: int, max_bytes: int, key: str) -> StringArray:
        """Return the next `n` strings, each behind its length in eight bytes, none longer than `max_bytes`."""
        offsets = np.zeros(n + 1, dtype=np.uint32)
        data = bytearray()
        done = 0
        while done < n:
            ends = self._short_strings(n - done)
            if not len(ends):
                ends = self._whole_strings(n - done)
            if not len(ends):
                self._fetch_string(max_bytes, f"{key}[{done}]")
                continue
            lengths = np.diff(ends, prepend=self._at) - 8
            keep = np.ones(int(ends[-1]) - self._at, dtype=np.bool_)
            starts = ends - lengths - self._at
            for back in range(1, 9):
                keep[starts - back] = False
            walked = np.frombuffer(self._window, np.uint8, len(keep), self._at)
            offsets[done + 1 : done + 1 + len(ends)] = len(data) + np.cumsum(lengths)
            data += walked[keep].data
            self._at = int(ends[-1])
            done += len(ends)
        return StringArray(data, offsets)

    def _short_strings(self, n: int) -> NDArray[np.int64]:
        """Return the ends in the window of whole strings, at most `n`, as far as all have 1 to 255 bytes.

        The length of such a string is a byte followed by seven zeros, which text does not contain. So all places that
        look like lengths are found at once, and are lengths as long as each points to the next.
        """
        raw = np.frombuffer(self._window, np.uint8)[self._at :]
        if len(raw) < 8:
            return np.empty(0, np.int64)
        zero = raw == 0
        two = zero[:-1] & zero[1:]
        four = two[:-2] & two[2:]
        seven = four[:-3] & four[3:]
        starts = np.flatnonzero(seven[1:] & ~zero[:-7])
        if not len(starts) or starts[0]:
            return np.empty(0, np.int64)
        ends = starts + 8 + raw[starts]
        broken = ends[:-1] != starts[1:]
        n_good = min(n, int(broken.argmax()) + 1 if broken.any() else len(ends))
        ends = ends[:n_good]
        return ends[ends <= len(raw)] + self._at

    def _whole_strings(self, n: int) -> NDArray[np.int64]:
        """Return the ends in the window of at most `n` whole strings of any length."""
        unpack, window, at = _U64.unpack_from, self._window, self._at
        ends: list[int] = []
        while len(ends) < n and at + 8 <= len(window):
            at += 8 + unpack(window, at)[0]
            if at > len(window):
                break
            ends.append(at)
        return np.asarray(ends, dtype=np.int64)

    def _fetch_string(self, max_bytes: int, name: str) -> None:
        """Make the window hold the next string completely."""
        self._fill(8)
        (length,) = _U64.unpack_from(self._window, self._at)
        if length > max_bytes:
            raise BadHeader(self.path, f"the string {name} has {length} bytes, more than {human(max_bytes)}")
        self._fill(8 + length)

    def _fill(self, n: int) -> None:
        """Make the window hold at least the next `n` bytes."""
        if n > self.left:
            raise TruncatedFile(
                self.path, f"the file ends after {human(self.file_bytes)} ({self.file_bytes} bytes), inside its header"
            )
        if self._at + n <= len(self._window):
            return
        if self.position + n > MAX_HEADER_BYTES:
            raise BadHeader(self.path, f"the header is longer than {human(MAX_HEADER_BYTES)}")
        self._hash.update(memoryview(self._window)[: self._at])
        rest = self._window[self._at :]
        want = min(max(WINDOW_BYTES, n) - len(rest), self.file_bytes - self._read_bytes)
        self._window, self._at = b"", 0
        fresh = self._pread(want)
        self._read_bytes += len(fresh)
        self._window = rest + fresh
        if len(self._window) < n:
            raise TruncatedFile(self.path, "the file became shorter while it was read", "wait until it is complete")

    def _pread(self, n: int) -> bytes:
        buffer = bytearray(n)
        done = 0
        while done < n:
            got = self._pread_into(memoryview(buffer)[done:], self._read_bytes + done)
            if got == 0:
                break
            done += got
        return bytes(buffer[:done])

    def _pread_into(self, view: memoryview, offset: int) -> int:
        try:
            if self._flags:
                try:
                    return os.preadv(self._fd, [view], offset, self._flags)
                except (OSError, NotImplementedError):
                    self._flags = 0  # this kernel or file system does not know the flag; plain reads follow
            if hasattr(os, "preadv"):
                return os.preadv(self._fd, [view], offset)
            os.lseek(self._fd, offset, os.SEEK_SET)  # Windows has no pread
            data = os.read(self._fd, len(view))
            view[: len(data)] = data
            return len(data)
        except OSError as error:
            raise ModelFileError(self.path, f"reading failed: {error.strerror}", "check the device") from error
