"""What a model in the form of one computed graph says of itself, as values: ports, weights, operations, names.

Knows no file format. `edgelm.files.onnx` reads graphs, `edgelm.files.genai` the folders that explain them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

ITEM_BITS: Mapping[str, int] = {
    "float32": 32, "uint8": 8, "int8": 8, "uint16": 16, "int16": 16, "int32": 32, "int64": 64, "bool": 8,
    "float16": 16, "float64": 64, "uint32": 32, "uint64": 64, "complex64": 64, "complex128": 128, "bfloat16": 16,
    "float8e4m3fn": 8, "float8e4m3fnuz": 8, "float8e5m2": 8, "float8e5m2fnuz": 8, "uint4": 4, "int4": 4,
    "float4e2m1": 4, "float8e8m0": 8, "uint2": 2, "int2": 2,
}  # fmt: skip
"""Bits of one number of each type that weights may have."""


class Port(NamedTuple):
    """An input or output of a graph. A dimension without a number is 0. `type` is a name of `ITEM_BITS`."""

    name: str
    type: str
    shape: tuple[int, ...]


class Weight(NamedTuple):
    """A constant of a graph: `n_bytes` at `offset` of file number `file`, or inside the graph's own file (-1)."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int
    file: int
    offset: int

    @property
    def n_items(self) -> int:
        """How many numbers it has."""
        return self.n_bytes * 8 // ITEM_BITS[self.type]


class Node(NamedTuple):
    """One operation. `numbers` are its whole-number attributes; an input that is left out is ""."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: Mapping[str, int]


class Graph(NamedTuple):
    """A graph, with the nodes of graphs inside it. `files` hold the weights that are not in `path` itself."""

    path: Path
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    weights: Mapping[str, Weight]
    nodes: tuple[Node, ...]
    files: tuple[Path, ...]


class CacheNames(NamedTuple):
    """What the cache of one layer is called: its inputs, and the outputs that hold the same and what came new."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str


class GraphModel:
    """A language model whose whole pass is one graph, and the names of what goes in and out.

    `positions` is None where the graph counts them itself. Caches are [1, heads, places, dimension]. `sees_last`: only
    the last token's logits come out.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        ids: str,
        mask: str,
        positions: str | None,
        logits: str,
        layers: tuple[CacheNames, ...],
        n_kv_heads: int,
        head_dim: int,
        n_vocab: int,
        n_context: int,
    ) -> None:
        self.graph = graph
        self.ids, self.mask, self.positions, self.logits, self.layers = ids, mask, positions, logits, layers
        self.n_kv_heads, self.head_dim, self.n_vocab, self.n_context = n_kv_heads, head_dim, n_vocab, n_context

    @property
    def cache_type(self) -> str:
        """The type of keys and values: "float16" or "float32"."""
        return self.graph.inputs[self.layers[0].past_key].type

    @property
    def sees_last(self) -> bool:
        return self.graph.outputs[self.logits].shape[1] == 1

    @cached_property
    def cache_in_place(self) -> bool:
        """Whether every cache is read by GroupQueryAttention alone, which adds new tokens where the old ones lie."""
        caches = {name for layer in self.layers for name in (layer.past_key, layer.past_value)}
        readers = [node.op for node in self.graph.nodes for name in node.inputs if name in caches]
        return len(readers) == len(caches) and set(readers) == {"GroupQueryAttention"}
