"""Typed access to the metadata of one architecture: every value checked for type and range where it is read.

Knows how GGUF names keys (`<architecture>.<key>`); not which keys an architecture has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from edgelm.errors import ModelFileError, UnsupportedModel
from edgelm.files.model import ModelFile

# inside the class the usual names are methods
Int: TypeAlias = int
Float: TypeAlias = float
Str: TypeAlias = str
Bool: TypeAlias = bool

MAX_INT = 2**31 - 1
MAX_FLOAT = 1e30


class Meta:
    """The metadata of a model, with the architecture's name as the prefix of every key.

    A key that begins with a dot is not prefixed: `meta.str(".general.name")`. Without a default, a missing key raises
    `UnsupportedModel`; a value of the wrong type or out of range always raises `ModelFileError`.
    """

    __slots__ = ("architecture", "metadata", "path")

    def __init__(self, path: Path | Str, architecture: Str, metadata: Mapping[Str, Any]) -> None:
        self.path, self.architecture, self.metadata = path, architecture, metadata

    @classmethod
    def of(cls, model: ModelFile) -> Meta:
        """Return the accessor of an opened model."""
        return cls(model.paths[0], model.architecture, model.metadata)

    def has(self, key: Str) -> Bool:
        """Return whether the file has this key."""
        return self._full(key) in self.metadata

    def int(self, key: Str, default: Int | None = None, *, least: Int = 0, most: Int = MAX_INT) -> Int:
        """Return a whole number from `least` to `most`."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return int(self._ranged(key, value, least, most))

    def float(
        self, key: Str, default: Float | None = None, *, least: Float = -MAX_FLOAT, most: Float = MAX_FLOAT
    ) -> Float:
        """Return a finite number from `least` to `most`; whole numbers count."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        return float(self._ranged(key, value, least, most))

    def str(self, key: Str, default: Str | None = None) -> Str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def bool(self, key: Str, default: Bool | None = None) -> Bool:
        """Return a truth value."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "a truth value")
        return value

    def ints(
        self, key: Str, n: Int, default: Int | None = None, *, least: Int = 0, most: Int = MAX_INT
    ) -> tuple[Int, ...]:
        """Return `n` whole numbers: an array of `n` (one per layer), or one number for all of them."""
        value = self._get(key, default)
        if not isinstance(value, np.ndarray):
            return (self.int(key, default, least=least, most=most),) * n
        if value.dtype.kind not in "iu":
            raise self._wrong(key, value, "whole numbers")
        if len(value) != n:
            raise ModelFileError(self.path, f"{self._full(key)} has {len(value)} numbers, {n} are needed")
        return tuple(self._ranged(key, number, least, most) for number in value.tolist())

    def bools(self, key: Str, n: Int, default: Bool | None = None) -> tuple[Bool, ...]:
        """Return `n` truth values: an array of `n` (one per layer), or one for all of them."""
        value = self._get(key, default)
        if not isinstance(value, np.ndarray):
            return (self.bool(key, default),) * n
        if value.dtype.kind != "b":
            raise self._wrong(key, value, "truth values")
        if len(value) != n:
            raise ModelFileError(self.path, f"{self._full(key)} has {len(value)} truth values, {n} are needed")
        return tuple(value.tolist())

    def _full(self, key: Str) -> Str:
        return key[1:] if key.startswith(".") else f"{self.architecture}.{key}"

    def _get(self, key: Str, default: Any) -> Any:
        value = self.metadata.get(self._full(key), default)
        if value is None:
            raise UnsupportedModel(
                f"{self.path}: the file does not say {self._full(key)}, which {self.architecture} models need; "
                "convert the model again with a newer converter"
            )
        return value

    def _wrong(self, key: Str, value: Any, wanted: Str) -> ModelFileError:
        return ModelFileError(self.path, f"{self._full(key)} is of type {type(value).__name__}, not {wanted}")

    def _ranged(self, key: Str, value: Any, least: Float, most: Float) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelFileError(self.path, f"{self._full(key)} is {value}, not a finite number")
        if not least <= value <= most:
            raise ModelFileError(self.path, f"{self._full(key)} is {value:.6g}, not between {least:g} and {most:g}")
        return value
