"""How keys and values lie in memory, as a value. Knows no NumPy: a child that tries a backend has no use for it."""

from __future__ import annotations

from typing import Literal, NamedTuple


class CacheLayout(NamedTuple):
    """How a backend wants keys and values to lie. Keys are always [head, place, dimension].

    `item`: "f16" or "f32". `values`: "dim_place" is [head, dimension, place] (with the places innermost, the weighted
    sum over values is a matrix product without a copy), "place_dim" as the keys. Without `rings` layers with a window
    have a place for every position, too, and the place is the position.
    """

    item: Literal["f16", "f32"] = "f16"
    values: Literal["dim_place", "place_dim"] = "dim_place"
    rings: bool = True

    @property
    def dtype(self) -> str:
        """The item type as NumPy calls it."""
        return "float16" if self.item == "f16" else "float32"


USUAL = CacheLayout()
