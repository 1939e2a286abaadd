"""Map text to one byte per code point, so that byte regexes can speak of Unicode categories.

ASCII stays itself; every other code point becomes a class byte. The table is Unicode 15.1, the version
libllama ships, and is written by bench/make_unicode_classes.py. Knows no pre-tokenizer.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

_TABLE = Path(__file__).with_name("unicode_classes.bin")
_N_BLOCKS, _BLOCK = 0x1100, 256

CodePoints = npt.NDArray[np.uint32]


def code_points(text: str) -> CodePoints:
    """Return the code points of `text`; it holds no lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def class_bytes(text: str) -> bytes:
    """Return one byte per code point of `text`: ASCII as it is, else 0x0B white space, 0xD1 number,
    0xD2 letter, 0xD3 punctuation, 0xD4 mark, 0xD5 symbol, 0xD0 anything else."""
    if text.isascii():
        return text.encode("ascii")
    index, blocks = _tables()
    points = code_points(text)
    classes: bytes = blocks[(index[points >> 8] << np.uint32(8)) | (points & 255)].tobytes()
    return classes


@functools.cache
def _tables() -> tuple[CodePoints, npt.NDArray[np.uint8]]:
    raw = zlib.decompress(_TABLE.read_bytes())
    index = np.frombuffer(raw, dtype="<u2", count=_N_BLOCKS).astype(np.uint32)
    return index, np.frombuffer(raw, dtype=np.uint8, offset=2 * _N_BLOCKS)
