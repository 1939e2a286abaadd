"""io_uring through ctypes: just enough to read ranges of a file with many requests in flight from one thread.

For `flash.py`, which compares it with threads. Linux on little-endian machines; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Any

_SETUP, _ENTER = 425, 426  # the numbers of the system calls everywhere
_OFF_SQES, _GETEVENTS, _OP_READ = 0x10000000, 1, 22
_SINGLE_ISSUER, _DEFER_TASKRUN = 1 << 12, 1 << 13  # Linux 6.1: completions cost no interrupt of the one thread
_SQE = struct.Struct("<BBHiQQIIQHHiQQ")
_CQE = struct.Struct("<QiI")


class Ring:
    """A ring for `depth` requests. Only the thread that made it may use it. Raises `OSError` where it is refused."""

    def __init__(self, depth: int) -> None:
        self._call: Any = ctypes.CDLL(None, use_errno=True).syscall  # gives the interpreter's lock away while it waits
        params = (ctypes.c_uint32 * 30)()
        params[2] = _SINGLE_ISSUER | _DEFER_TASKRUN
        self.handle = self._check(self._call(_SETUP, depth, params))
        n_sq, n_cq = params[0], params[1]
        sq, cq = list(params[10:18]), list(params[20:28])
        size = max(sq[6] + 4 * n_sq, cq[5] + _CQE.size * n_cq)  # one map for both rings since Linux 5.4
        self._rings = mmap.mmap(self.handle, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._sqes = mmap.mmap(
            self.handle, _SQE.size * n_sq, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=_OFF_SQES
        )
        self._words = memoryview(self._rings)[: size // 4 * 4].cast("I")
        self._sq_tail, self._sq_array, self._n_sq = sq[1] // 4, sq[6] // 4, n_sq
        self._cq_head, self._cq_tail, self._cqes, self._n_cq = cq[0] // 4, cq[1] // 4, cq[5], n_cq
        self._n_new = 0

    def read(self, file: int, address: int, n_bytes: int, offset: int, tag: int) -> None:
        """Note a request; `wait` hands it over."""
        tail = self._words[self._sq_tail]
        slot = tail % self._n_sq
        _SQE.pack_into(
            self._sqes, slot * _SQE.size, _OP_READ, 0, 0, file, offset, address, n_bytes, 0, tag, 0, 0, 0, 0, 0
        )
        self._words[self._sq_array + slot] = slot
        self._words[self._sq_tail] = (tail + 1) & 0xFFFFFFFF
        self._n_new += 1

    def wait(self) -> list[tuple[int, int]]:
        """Hand new requests over, wait until at least one is done, and return (tag, bytes read) of those that are."""
        self._check(self._call(_ENTER, self.handle, self._n_new, 1, _GETEVENTS, None, 0))
        self._n_new = 0
        head, tail = self._words[self._cq_head], self._words[self._cq_tail]
        done = []
        while head != tail:
            tag, result, _ = _CQE.unpack_from(self._rings, self._cqes + head % self._n_cq * _CQE.size)
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            done.append((tag, result))
            head = (head + 1) & 0xFFFFFFFF
        self._words[self._cq_head] = head
        return done

    def close(self) -> None:
        self._words.release()
        self._rings.close()
        self._sqes.close()
        os.close(self.handle)

    def _check(self, result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result
