"""Which types keys and values may have: what was asked for, what a backend can do, what fits the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from edgelm.engine.backend import Backend, Capabilities
from edgelm.errors import ConfigError, EdgeLMError, UnsupportedModel
from edgelm.memory.arena import LayerCache
from edgelm.memory.cache_layout import BLOCK, ITEMS, CacheLayout, Item, is_quantized

AUTO: tuple[tuple[Item, Item], ...] = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"))
"""What `auto` tries, from what costs nothing to what costs most.

Not keys in 4 bits: they cost a fifth of perplexity on small models (`bench/kv.py`), so they are for whoever asks.
"""


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


def pairs_of(kv: str, can: Capabilities) -> tuple[tuple[Item, Item], ...]:
    """Return the pairs of types that `kv` stands for and a backend has. What stands for f16 may be its own float32."""
    return tuple(pair for pair in parse_types(kv) if pair == AUTO[0] or can.kv.issuperset(pair))


def lacking(kv: str, can: Capabilities) -> str:
    """Say which types a backend has, if it has none of those that `kv` stands for; empty if it has."""
    if pairs_of(kv, can):
        return ""
    return f"keeps keys and values as {', '.join(sorted(can.kv | {*can.cache.items}))} only, not as {kv}"


def layout_like(can: Capabilities, items: tuple[Item, Item]) -> CacheLayout:
    """Return how a backend keeps such keys and values, or what it has in their place."""
    some = any(map(is_quantized, items)) and can.kv.issuperset(items)
    return can.cache.of_types(*items) if some else can.cache


def layouts_for(kv: str, backend: Backend, layers: Callable[[], Sequence[LayerCache]]) -> tuple[CacheLayout, ...]:
    """Return the layouts that a cache may have, the preferred one first.

    Raises `UnsupportedModel` if this backend has none of them, or the model's heads cannot be cut into blocks.
    """
    can = backend.capabilities()
    if why_not := lacking(kv, can):
        others = "".join(f"--backend {name}, " for name in _who_keeps(kv))
        raise UnsupportedModel(f"the {backend.name} backend {why_not}; use {others}or --kv f16".replace(", or", " or"))
    found = pairs_of(kv, can)
    if not any(map(is_quantized, (item for pair in found for item in pair))):
        return (can.cache,)
    uneven = sorted({dim for layer in layers() for dim in (layer.head_dim_k, layer.head_dim_v) if dim % BLOCK})
    fitting = [pair for pair in found if not uneven or not any(map(is_quantized, pair))]
    if not fitting:
        raise UnsupportedModel(
            f"keys and values of heads with {uneven[0]} numbers cannot be cut into blocks of {BLOCK}; use --kv f16"
        )
    return tuple(layout_like(can, pair) for pair in fitting)


def _who_keeps(kv: str) -> list[str]:
    """Return the backends that work here and have such types; simulated ones are not named."""
    from edgelm.engine.health import check
    from edgelm.engine.registry import backend_names, get_backend

    found = []
    for name in backend_names():
        with suppress(EdgeLMError):
            if check(name).available:
                can = get_backend(name).capabilities()
                found += [name] if pairs_of(kv, can) and not can.simulated else []
    return found
