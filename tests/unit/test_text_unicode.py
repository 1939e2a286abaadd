"""The class of every code point."""

from __future__ import annotations

import unicodedata

from edgelm.text.unicode_classes import class_bytes

OTHER, NUMBER, LETTER, PUNCTUATION, MARK, SYMBOL, SPACE = 0xD0, 0xD1, 0xD2, 0xD3, 0xD4, 0xD5, 0x0B
CLASS = {"N": NUMBER, "L": LETTER, "P": PUNCTUATION, "M": MARK, "S": SYMBOL}


def test_ascii_is_itself() -> None:
    ascii_text = "".join(map(chr, range(128)))
    assert class_bytes(ascii_text + "é")[:-1] == class_bytes(ascii_text) == ascii_text.encode()


def test_classes_of_samples() -> None:
    assert list(class_bytes("é²、\u0301€\u2003\u200b\uffff")) == [
        LETTER, NUMBER, PUNCTUATION, MARK, SYMBOL, SPACE, OTHER, OTHER,
    ]  # fmt: skip


def test_classes_agree_with_this_python_where_both_know_the_character() -> None:
    points = [point for point in range(0x80, 0x110000) if not 0xD800 <= point < 0xE000]
    classes = class_bytes("".join(map(chr, points)))
    differing = [
        point
        for point, found in zip(points, classes, strict=True)
        if unicodedata.category(chr(point)) != "Cn"
        and found not in (OTHER, SPACE)
        and found != CLASS.get(unicodedata.category(chr(point))[0])
    ]
    assert len(differing) < 20  # a later Unicode moves a few characters between categories
    spaces = [point for point, found in zip(points, classes, strict=True) if found == SPACE]
    assert spaces == [point for point in points if chr(point).isspace()]
