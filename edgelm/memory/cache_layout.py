"""How keys and values lie in memory, as a value. Knows no NumPy: a child that tries a backend has no use for it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Item = Literal["f32", "f16", "q8_0", "q4_0"]
ITEMS: tuple[Item, ...] = ("f32", "f16", "q8_0", "q4_0")
BLOCK = 32
"""Numbers of a block of the quantized types, which share a scale: a head's dimension must be a multiple of it."""
_BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


def is_quantized(item: Item) -> bool:
    return item.startswith("q")


def vector_bytes(item: Item, dim: int) -> int:
    """Return the bytes of a vector of `dim` numbers of this type."""
    return int(dim * _BITS[item] / 8)


class CacheLayout(NamedTuple):
    """How a backend wants keys and values to lie. Keys are always [head, place, dimension].

    `item`: what keys are made of, and values if no `value_item` is given; quantized types are ggml's blocks. `values`:
    "dim_place" is [head, dimension, place] (with the places innermost, the weighted sum over values is a matrix product
    without a copy), "place_dim" as the keys; quantized values must lie so. Without `rings` layers with a window have a
    place for every position, too, and the place is the position. `windows`: how many windows a ring holds; answers that
    are computed side by side have one each.
    """

    item: Item = "f16"
    values: Literal["dim_place", "place_dim"] = "dim_place"
    rings: bool = True
    value_item: Item | None = None
    windows: int = 1

    @property
    def items(self) -> tuple[Item, Item]:
        """The types of keys and of values."""
        return self.item, self.value_item or self.item

    @property
    def dtype(self) -> str:
        """The type of keys as NumPy calls it, if it is not a quantized one."""
        return {"f16": "float16", "f32": "float32"}[self.item]

    def of_types(self, keys: Item, values: Item) -> CacheLayout:
        """Return this layout with other types."""
        order = "place_dim" if is_quantized(values) else self.values
        return self._replace(item=keys, value_item=None if values == keys else values, values=order)


USUAL = CacheLayout()
