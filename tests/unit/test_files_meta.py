"""Typed metadata: each value has its type and range, or an error names the key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.errors import ModelFileError, UnsupportedModel
from edgelm.files import Meta, StringArray, open_model
from edgelm.testing import tiny_model

VALUES: dict[str, Any] = {
    "llama.block_count": 3,
    "llama.negative": -1,
    "llama.huge": 2**40,
    "llama.eps": 1e-5,
    "llama.nan": float("nan"),
    "llama.name": "x",
    "llama.flag": True,
    "llama.heads": np.asarray([4, 2, 4], np.uint32),
    "llama.negatives": np.asarray([4, -2, 4], np.int32),
    "llama.flags": np.asarray([True, False, True]),
    "llama.floats": np.asarray([1.0, 2.0, 3.0], np.float32),
    "llama.names": StringArray.of(["a"]),
    "general.name": "tiny",
}


@pytest.fixture
def meta() -> Meta:
    return Meta("m.gguf", "llama", VALUES)


def test_values(meta: Meta) -> None:
    assert meta.int("block_count") == 3
    assert meta.float("eps") == 1e-5
    assert meta.float("block_count") == 3.0
    assert meta.str("name") == "x"
    assert meta.bool("flag") is True
    assert meta.str(".general.name") == "tiny"
    assert meta.ints("heads", 3) == (4, 2, 4)
    assert meta.ints("block_count", 2) == (3, 3)
    assert meta.bools("flags", 3) == (True, False, True)
    assert meta.bools("flag", 2) == (True, True)
    assert meta.has("eps")
    assert not meta.has("missing")
    assert meta.int("negative", least=-1) == -1


def test_defaults(meta: Meta) -> None:
    assert meta.int("missing", 0) == 0
    assert meta.float("missing", 0.5) == 0.5
    assert meta.str("missing", "") == ""
    assert meta.bool("missing", False) is False
    assert meta.ints("missing", 2, 7) == (7, 7)
    assert meta.bools("missing", 1, True) == (True,)


def test_a_missing_key_is_named(meta: Meta) -> None:
    for read in (meta.int, meta.float, meta.str, meta.bool):
        with pytest.raises(UnsupportedModel, match=r"does not say llama\.missing"):
            read("missing")


WRONG: dict[str, tuple[Callable[[Meta], object], str]] = {
    "int of a string": (lambda m: m.int("name"), "llama.name is of type str"),
    "int of a truth value": (lambda m: m.int("flag"), "of type bool"),
    "int of a float": (lambda m: m.int("eps"), "of type float"),
    "negative": (lambda m: m.int("negative"), "llama.negative is -1"),
    "absurd": (lambda m: m.int("huge"), "not between"),
    "too small": (lambda m: m.int("block_count", least=4), "not between 4"),
    "float of a truth value": (lambda m: m.float("flag"), "not a number"),
    "not finite": (lambda m: m.float("nan"), "not a finite number"),
    "string of a number": (lambda m: m.str("eps"), "not a string"),
    "truth value of a number": (lambda m: m.bool("block_count"), "not a truth value"),
    "too few": (lambda m: m.ints("heads", 4), "has 3 numbers, 4 are needed"),
    "floats": (lambda m: m.ints("floats", 3), "not whole numbers"),
    "truth values as numbers": (lambda m: m.ints("flags", 3), "not whole numbers"),
    "a negative in an array": (lambda m: m.ints("negatives", 3), "is -2"),
    "strings": (lambda m: m.ints("names", 1), "of type StringArray"),
    "too few truth values": (lambda m: m.bools("flags", 2), "has 3 truth values, 2 are needed"),
    "numbers as truth values": (lambda m: m.bools("heads", 3), "not truth values"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_names_its_key(meta: Meta, name: str) -> None:
    read, fact = WRONG[name]
    with pytest.raises(ModelFileError) as caught:
        read(meta)
    assert fact in str(caught.value)
    assert str(caught.value).startswith("m.gguf: llama.")


def test_of_an_opened_model(tmp_path: Path) -> None:
    model = open_model(tiny_model(tmp_path / "a.gguf", "gemma3"))
    meta = Meta.of(model)
    assert meta.architecture == "gemma3"
    assert meta.int("attention.sliding_window") == 16
