"""Write edgelm/text/unicode_classes.bin from a Unicode data package.

libllama's tables are Unicode 15.1, so the ids only agree with that version:

    pip install unicodedata2==15.1.0 && python bench/make_unicode_classes.py
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

UNICODE_VERSION = "15.1.0"
TARGET = Path(__file__).parents[1] / "edgelm" / "text" / "unicode_classes.bin"
BLOCK = 256
WHITESPACE, OTHER = 0x0B, 0xD0
CLASS_OF_CATEGORY = {"N": 0xD1, "L": 0xD2, "P": 0xD3, "M": 0xD4, "S": 0xD5}
SPACES = {0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}


def class_of(code_point: int, category: str) -> int:
    if code_point < 0x80:
        return code_point
    return WHITESPACE if code_point in SPACES else CLASS_OF_CATEGORY.get(category[0], OTHER)


def main() -> int:
    import unicodedata2

    if unicodedata2.unidata_version != UNICODE_VERSION:
        print(f"need unicodedata2=={UNICODE_VERSION}, found {unicodedata2.unidata_version}", file=sys.stderr)
        return 1
    classes = bytes(class_of(code_point, unicodedata2.category(chr(code_point))) for code_point in range(0x110000))
    blocks: dict[bytes, int] = {}
    index = bytearray()
    for start in range(0, len(classes), BLOCK):
        index += blocks.setdefault(classes[start : start + BLOCK], len(blocks)).to_bytes(2, "little")
    TARGET.write_bytes(zlib.compress(bytes(index) + b"".join(blocks), 9))
    print(f"{TARGET.name}: {len(blocks)} blocks, {TARGET.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
