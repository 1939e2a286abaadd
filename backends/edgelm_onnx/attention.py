"""The operation `attend` as operators of ONNX: fused where keys and values are equally long, else written out.

`GroupQueryAttention` writes the cache in place and wants every position at its place. Written out, keys and values are
scattered into the cache, which is input and output at one address, so that nothing is copied; then any place will do.
Both keep the cache in float16, [head, place, dimension].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import PassShape
from edgelm.engine.ir import AttendSpec, Op
from edgelm_onnx import proto
from edgelm_onnx.proto import FLOAT, FLOAT16, INT32, INT64

if TYPE_CHECKING:
    from edgelm_onnx.lowering import _Lowering


WIDEST_FUSED = 128
"""Heads that are wider are summed up in another order while fewer than 65 positions are stored."""


PassForm = Literal["single", "chain", "tree"]
"""Passes of one token, of tokens that follow each other, and of others."""


def pass_form(shape: PassShape) -> PassForm:
    return "tree" if shape.tree else "single" if shape.n_tokens == 1 else "chain"


def is_fused(spec: AttendSpec, form: PassForm) -> bool:
    """Say whether one operator computes this attention. It knows no mask, so those of a tree are written out.

    Wider passes must have the same bits however a prompt is cut, which those of one token are never compared with.
    """
    if form == "tree" or spec.head_dim_k != spec.head_dim_v:
        return False
    return form == "single" or spec.head_dim_k <= WIDEST_FUSED


def lower(build: _Lowering, op: Op, spec: AttendSpec) -> None:
    if is_fused(spec, build.form):
        _fused(build, op, spec)
    else:
        _written_out(build, op, spec)


def _fused(build: _Lowering, op: Op, spec: AttendSpec) -> None:
    from edgelm_onnx.lowering import Slot, Source

    layer, y = spec.layer, build.names[op.output]
    halves: list[str] = []
    for value in op.inputs:
        name = f"{y}.{len(halves)}.f16"
        if value not in op.inputs[: len(halves)]:
            build.node("Cast", (build.names[value],), name, _half(build, value), to=FLOAT16)
        halves.append(name)
    cache = []
    for kind in ("keys", "values"):
        shape = (1, spec.n_kv_heads, f"capacity{spec.group}", spec.head_dim_k)
        source = Source(f"cache_{kind}", layer)
        cache.append(build.input(Slot(f"{kind}{layer}", source, FLOAT16, shape)))
        build.out.outputs.append(Slot(f"{kind}{layer}.after", source, FLOAT16, shape))
    last = build.input(Slot("last", Source("last"), INT32, (1,)))
    total = build.input(Slot("total", Source("total"), INT32, (1,)))
    attributes: dict[str, proto.Attribute] = {
        "num_heads": spec.n_heads,
        "kv_num_heads": spec.n_kv_heads,
        "scale": spec.scale,
        "do_rotary": 0,
    }
    if spec.window:
        attributes["local_window_size"] = spec.window
    if spec.softcap:
        attributes["softcap"] = spec.softcap
    mixed = f"{y}.f16"
    outputs = (mixed, f"keys{layer}.after", f"values{layer}.after")
    node = proto.Node("GroupQueryAttention", (*halves, *cache, last, total), outputs, attributes, "com.microsoft")
    build.out.nodes.append(node)
    build.out.temporaries[mixed] = _half(build, op.output)
    build.out.temporaries[f"{mixed}!"] = lambda shape: _fused_bytes(spec, shape)
    build.emit(op, "Cast", (mixed,), to=FLOAT)


def _fused_bytes(spec: AttendSpec, shape: PassShape) -> int:
    """Scores of all heads over the whole cache, the cache as float32, and what comes and goes, head by head."""
    n, seen = shape.n_tokens, shape.groups[spec.group].capacity
    vectors = n * (2 * spec.n_heads + 2 * spec.n_kv_heads) + 2 * spec.n_kv_heads * seen
    return 4 * (spec.n_heads * n * seen + vectors * spec.head_dim_k)


def _half(build: _Lowering, value: int) -> Callable[[PassShape], int]:
    size = build.size(value)
    return lambda shape: size(shape) // 2


def _written_out(build: _Lowering, op: Op, spec: AttendSpec) -> None:
    from edgelm_onnx.lowering import Slot, Source

    y, heads, layer = build.names[op.output], spec.n_kv_heads, spec.layer
    sharing = spec.n_heads // heads
    cache = {}
    length = build.input(Slot(f"length{spec.group}", Source("length", spec.group), INT64, (1,)))
    at = build.input(Slot(f"places{layer}", Source("places", layer), INT64, (f"places{layer}", 1)))
    mask = build.input(Slot(f"mask{spec.group}", Source("mask", spec.group), FLOAT, ("tokens", f"length{spec.group}")))
    for kind, value, dim in (("keys", op.inputs[1], spec.head_dim_k), ("values", op.inputs[2], spec.head_dim_v)):
        name, small = f"{y}.{kind}", build.size(value)
        shape = (f"cells{layer}", dim)
        source = Source(f"cache_{kind}", layer)
        old = build.input(Slot(f"{kind}{layer}", source, FLOAT16, shape))
        build.out.outputs.append(Slot(f"{kind}{layer}.after", source, FLOAT16, shape))
        new = build.node("Reshape", (build.names[value], build.shape(-1, heads, dim)), f"{name}.apart", small)
        new = build.node("Transpose", (new,), f"{name}.heads", small, perm=(1, 0, 2))
        new = build.node("Reshape", (new, build.shape(-1, dim)), f"{name}.flat", small)
        new = build.node("Cast", (new,), f"{name}.f16", small, to=FLOAT16)
        build.out.nodes.append(proto.Node("ScatterND", (old, at, new), (f"{kind}{layer}.after",)))
        seen = _seen_bytes(spec, dim)
        new = build.node("Reshape", (f"{kind}{layer}.after", build.shape(heads, 1, -1, dim)), f"{name}.all", _nothing)
        new = build.node("Slice", (new, build.shape(0), length, build.shape(2)), f"{name}.seen", seen)
        cache[kind] = build.node("Cast", (new,), f"{name}.f32", seen, to=FLOAT)
    q, size = op.inputs[0], build.size(op.inputs[0])
    scores = _score_bytes(spec)
    x = build.node("Reshape", (build.names[q], build.shape(-1, heads, sharing, spec.head_dim_k)), f"{y}.q", size)
    x = build.node("Transpose", (x,), f"{y}.q.heads", size, perm=(1, 2, 0, 3))
    x = build.node("FusedMatMul", (x, cache["keys"]), f"{y}.qk", scores, "com.microsoft", transB=1, alpha=spec.scale)
    if spec.softcap:
        x = build.capped(x, spec.softcap, f"{y}.capped", scores)
    x = build.node("Add", (x, mask), f"{y}.masked", scores)
    x = build.node("Softmax", (x,), f"{y}.weights", scores, axis=-1)
    x = build.node("MatMul", (x, cache["values"]), f"{y}.mixed", build.size(op.output))
    x = build.node("Transpose", (x,), f"{y}.rows", build.size(op.output), perm=(2, 0, 1, 3))
    build.emit(op, "Reshape", (x, build.shape(1, -1, spec.n_heads * spec.head_dim_v)))


def _seen_bytes(spec: AttendSpec, dim: int) -> Callable[[PassShape], int]:
    return lambda shape: 4 * spec.n_kv_heads * dim * shape.groups[spec.group].length


def _score_bytes(spec: AttendSpec) -> Callable[[PassShape], int]:
    return lambda shape: 4 * spec.n_heads * shape.n_tokens * shape.groups[spec.group].length


def _nothing(_: PassShape) -> int:
    return 0


def cache_rows(n_heads: int, capacity: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows of a flat cache, [head * capacity + place, dimension], that a pass writes: int64 [rows, 1]."""
    heads = np.arange(n_heads, dtype=np.int64)[:, None] * capacity
    return (heads + places).reshape(-1, 1)
