"""Which types keys and values may have: what was asked for, what a backend can do, what fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgelm.engine.backend import Backend
from edgelm.errors import ConfigError, UnsupportedModel
from edgelm.memory.arena import LayerCache
from edgelm.memory.cache_layout import BLOCK, ITEMS, CacheLayout, Item, is_quantized

AUTO: tuple[tuple[Item, Item], ...] = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
"""What `auto` tries, from what costs nothing to what costs most; keys suffer more from fewer bits than values."""


def parse_types(kv: str) -> tuple[tuple[Item, Item], ...]:
    """Return the pairs of types that "f16", "q8_0:q4_0" or "auto" stand for. Raises `ConfigError` for anything else."""
    if kv == "auto":
        return AUTO
    keys, colon, values = kv.partition(":")
    types = {item: item for item in ITEMS if item != "f32"}
    if keys not in types or (colon and values not in types):
        raise ConfigError(
            f"unknown type {kv!r} of keys and values (known: {', '.join(types)}, two of them with a colon, or auto)"
        )
    return ((types[keys], types[values or keys]),)  # type: ignore[index]


def layouts_for(kv: str, backend: Backend, layers: Callable[[], Sequence[LayerCache]]) -> tuple[CacheLayout, ...]:
    """Return the layouts that a cache may have, the preferred one first.

    Raises `UnsupportedModel` if this backend has none of them, or the model's heads cannot be cut into blocks.
    """
    can, pairs = backend.capabilities(), parse_types(kv)
    found = [pair for pair in pairs if pair in (("f16", "f16"), can.cache.items) or can.kv.issuperset(pair)]
    if not found:
        raise UnsupportedModel(
            f"the {backend.name} backend keeps keys and values as {', '.join(sorted(can.kv))} only, not as {kv}; "
            "use --backend llamacpp, or --kv f16"
        )
    if not any(map(is_quantized, (item for pair in found for item in pair))):
        return (can.cache,)
    uneven = sorted({dim for layer in layers() for dim in (layer.head_dim_k, layer.head_dim_v) if dim % BLOCK})
    fitting = [pair for pair in found if not uneven or not any(map(is_quantized, pair))]
    if not fitting:
        raise UnsupportedModel(
            f"keys and values of heads with {uneven[0]} numbers cannot be cut into blocks of {BLOCK}; use --kv f16"
        )
    return tuple(can.cache if pair == ("f16", "f16") else can.cache.of_types(*pair) for pair in fitting)
