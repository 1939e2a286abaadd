"""How much memory ONNX Runtime takes for a graph on the CPU, told from the graph before anything is loaded.

Every weight is followed to the operations that read it: some repack it into memory of their own and let go of the
file, others read it where it is mapped, and what depends on weights alone is computed once and kept. Upper bounds,
measured against `VmHWM` (see docs/onnx.md); loads nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from edgelm.engine.backend import GraphMemory
from edgelm.files.graph import ITEM_BITS, Graph, GraphModel, Node, Weight

CODE_BYTES = 18_000_000
"""Pages of the library that importing it does not touch."""
NODE_BYTES, WEIGHT_BYTES = 24_000, 6_000
"""What the session keeps of an operation and of a weight beside the numbers: objects, names, shapes, kernels."""
THREAD_BYTES = 200_000
PANEL = 16
"""Columns of a packed float matrix come in panels of so many."""
BLOCK_BYTES = 8
"""A packed block of quantized weights carries a scale and a sum of its own."""
WIDE_VALUES = 6
"""Values as wide as the widest matrix that are alive at a time."""
_MATRIX = {"MatMul": 1, "Gemm": 1, "FusedMatMul": 1}
"""The input that these pack as float32."""
_QUANTIZED = {"MatMulNBits": 1}
_MAPPED = frozenset({
    "Gather", "GatherBlockQuantized", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
    "LayerNormalization", "SkipLayerNormalization", "RMSNormalization", "GroupQueryAttention", "RotaryEmbedding",
    "MultiHeadAttention", "Add", "Mul", "Sub", "Div", "Where", "If",
})  # fmt: skip
"""Operations that read weights where they are."""
_FOLDED = frozenset({
    "Transpose", "Reshape", "Cast", "Unsqueeze", "Squeeze", "Identity", "Concat", "Slice", "Shape", "ConstantOfShape",
})  # fmt: skip
"""Operations that are computed once while loading if all they read is constant."""
_HALF_ON_CPU = frozenset({"Gather", "GroupQueryAttention", "MultiHeadAttention", "MatMulNBits", "GatherBlockQuantized"})
"""Operations that compute with half precision as it is; others get float32 copies of half weights."""


class _Use(NamedTuple):
    op: str
    at: int
    numbers: Mapping[str, int]


def graph_memory(graph: Graph, n_threads: int) -> GraphMemory:
    """Return what a session of this graph takes at the most, and at the peak of making it."""
    weights, uses = _constants(graph)
    kept = gone = 0
    for weight in weights.values():
        n_bytes, stays = _resident(weight, uses[weight.name])
        kept += n_bytes
        if not stays:
            gone = max(gone, weight.n_bytes)
    library = CODE_BYTES + NODE_BYTES * len(graph.nodes) + WEIGHT_BYTES * len(weights) + THREAD_BYTES * n_threads
    return GraphMemory(kept, library, kept + library + gone)


def _constants(graph: Graph) -> tuple[dict[str, Weight], dict[str, list[_Use]]]:
    """Return all constants, those computed of others included, and who reads each of them."""
    weights = dict(graph.weights)
    uses: dict[str, list[_Use]] = defaultdict(list)
    for node in graph.nodes:
        named = [name for name in node.inputs if name]
        if node.op in _FOLDED and named and all(name in weights for name in named):
            for made in _folded(node, [weights[name] for name in named]):
                weights[made.name] = made
            uses_as = "folded"
        else:
            uses_as = node.op
        for at, name in enumerate(node.inputs):
            if name in weights:
                uses[name].append(_Use(uses_as, at, node.numbers))
    return weights, uses


def _folded(node: Node, sources: list[Weight]) -> Iterator[Weight]:
    n_items = sum(weight.n_items for weight in sources)
    kind = "float32" if node.op == "Cast" and node.numbers.get("to") == 1 else sources[0].type
    for name in node.outputs[:1]:
        yield Weight(name, kind, sources[0].shape, n_items * ITEM_BITS[kind] // 8, -1, 0)


def _resident(weight: Weight, uses: list[_Use]) -> tuple[int, bool]:
    """Return the memory that a weight takes in the end, and whether its own bytes are part of that."""
    copies, stays = 0, False
    for use in uses:
        half = weight.type == "float16" and use.op not in _HALF_ON_CPU
        if _MATRIX.get(use.op) == use.at and len(weight.shape) == 2:
            copies += weight.shape[0] * -(-weight.shape[1] // PANEL) * PANEL * 4
        elif _QUANTIZED.get(use.op) == use.at:
            n_numbers = weight.n_bytes * 8 // max(use.numbers.get("bits", 4), 1)
            copies += weight.n_bytes + -(-n_numbers // max(use.numbers.get("block_size", 32), 1)) * BLOCK_BYTES
        elif use.op in _MAPPED or use.op in _QUANTIZED:
            stays = True
            copies += weight.n_items * 4 if half else 0
        elif use.op != "folded":  # nothing is known of it: it may keep the bytes and a copy, as wide as numbers get
            stays = True
            copies += max(weight.n_bytes, weight.n_items * 4)
    return copies + weight.n_bytes * stays, stays


def scratch_bytes(model: GraphModel, n_tokens: int, context: int) -> int:
    """Return the memory that a pass takes for a moment, at the most."""
    graph = model.graph
    widest = max((_width(graph, node) for node in graph.nodes), default=0)
    heads = max((node.numbers.get("num_heads", 0) for node in graph.nodes), default=0)
    activations = WIDE_VALUES * n_tokens * widest * 4
    attention = n_tokens * heads * (context + WIDE_VALUES * model.head_dim) * 4
    # what is not float32 is computed in float32 beside it: the caches of one layer, and the logits
    cache = 2 * model.n_kv_heads * context * model.head_dim * 4
    caches = cache * ((model.cache_type == "float16") + (not model.cache_in_place))
    half = graph.outputs[model.logits].type == "float16"
    return activations + attention + caches + half * model.n_vocab * 4 * (1 if model.sees_last else n_tokens)


def _width(graph: Graph, node: Node) -> int:
    """Return how wide the result of a matrix product is, or what goes into it; 0 of logits, which the caller holds."""
    if any(name in graph.outputs for name in node.outputs):
        return 0
    if node.op in _QUANTIZED:
        return max(node.numbers.get("N", 0), node.numbers.get("K", 0))
    weight = graph.weights.get(node.inputs[1]) if node.op in _MATRIX and len(node.inputs) > 1 else None
    return max(weight.shape) if weight is not None and len(weight.shape) == 2 else 0
