"""String arrays behave like lists of strings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.files import StringArray


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=6), max_size=12))
def test_like_a_list(strings: list[str]) -> None:
    strings = [s.encode("utf-8", "replace").decode() for s in strings]
    array = StringArray.of(strings)
    assert list(array) == strings
    assert len(array) == len(strings)
    assert [array[i] for i in range(-len(strings), len(strings))] == strings * 2
    assert array[1:-1] == strings[1:-1]
    assert [array.raw(i) for i in range(len(strings))] == list(array.iter_raw())
    assert array == StringArray.of(strings)


def test_many() -> None:
    strings = [str(i) for i in range(10_000)]
    assert list(StringArray.of(strings)) == strings


@pytest.mark.parametrize("index", [2, -3])
def test_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=f"string {index} of 2"):
        StringArray.of(["a", "b"])[index]


def test_bytes_that_are_not_text() -> None:
    array = StringArray.of([b"a\xff", "b"])
    assert array[0] == "a\N{REPLACEMENT CHARACTER}"
    assert array.raw(0) == b"a\xff"
    assert "b" in array
    assert array != ["a"]
    assert repr(array) == "StringArray(2 strings, 3 bytes)"
