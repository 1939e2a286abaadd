"""From a segment to a ggml graph.

Every tensor that is bound from outside is created at a stand-in address, because ggml fixes the addresses of views
when they are made; `Graph.slots` remembers which pointers move with which binding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edgelm.engine.backend import PassShape, is_quantized, vector_bytes
from edgelm.engine.ir import AttendSpec, Columns, EncodeSpec, NormSpec, Op, RopeSpec, Segment
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.memory.cache_layout import Item
from edgelm_llamacpp.ggml import ROPE_NEOX, ROPE_NORMAL, TYPE_F16, TYPE_F32, TYPE_I32, TYPE_I64, Ggml

CACHE_TYPES = {"f16": TYPE_F16, "q8_0": int(TensorType.Q8_0), "q4_0": int(TensorType.Q4_0)}
_TILE_ROWS = 64  # of the least pass that ggml's fused attention computes in tiles
_STAND_IN = 1 << 40  # far from any real address, so that a forgotten binding faults instead of corrupting
_STAND_IN_STEP = 1 << 32
_UNSEEN = -1e30  # its exponential is 0; infinity, multiplied with the 0 of what is seen, would be no number
_TENSORS_PER_OP = 24
_TENSORS_PER_KIND = {"linear": 6, "rms_norm": 6, "add": 3, "gate": 3, "scale": 3, "slice": 4, "select": 3, "rope": 5}


@dataclass(slots=True)
class Pointer:
    """A `data` field that follows a binding at a distance of `offset` bytes."""

    variable: Any
    offset: int


@dataclass(slots=True)
class Graph:
    """A graph and its bindings: `slots[name]` lists the pointers to set for the binding of that name."""

    ggml: Ggml
    context: int
    graph: int
    slots: dict[tuple[str, int], list[Pointer]] = field(default_factory=dict)

    def free(self) -> None:
        if self.context:
            self.ggml.ggml_free(self.context)
            self.context = 0


def lower(ggml: Ggml, segment: Segment, shape: PassShape) -> Graph:
    """Build the graph of `segment` for passes of `shape`."""
    n_tensors = 4 + 2 * len(segment.values) + len(segment.weights) + 2 * segment.n_layers + 2 * len(shape.groups)
    n_tensors += sum(_TENSORS_PER_KIND.get(op.kind, _TENSORS_PER_OP) + len(op.inputs) for op in segment.ops)
    context = ggml.context(n_tensors, n_tensors)
    try:
        return _Lowering(ggml, segment, shape, context, n_tensors).build()
    except BaseException:
        ggml.ggml_free(context)
        raise


class _Lowering:
    def __init__(self, ggml: Ggml, segment: Segment, shape: PassShape, context: int, graph_size: int) -> None:
        self.g, self.segment, self.shape, self.ctx = ggml, segment, shape, context
        self.out = Graph(ggml, context, ggml.ggml_new_graph_custom(context, graph_size, False))
        self.roots: dict[int, tuple[tuple[str, int], int]] = {}
        self.tensors: dict[int, int] = {}
        self.forms: dict[int, tuple[int, ...]] = {}
        self.weight = 0
        self.shared: dict[tuple[str, int], int] = {}
        self.half_masks: dict[int, int] = {}
        self.bands: dict[int, int] = {}

    def build(self) -> Graph:
        for i, value in enumerate(self.segment.inputs):
            info = self.segment.values[value]
            leaf = self._leaf(("inputs", i), "2d", TYPE_F32, info.width, self.shape.rows(info.per))
            self._set(value, leaf, (info.width, self.shape.rows(info.per)))
        for op in self.segment.ops:
            getattr(self, f"_{op.kind}")(op)
        for value in self.segment.outputs:
            self.g.ggml_build_forward_expand(self.out.graph, self.tensors[value])
        return self.out

    # --- bindings

    def _leaf(self, slot: tuple[str, int], form: str, type_id: int, *ne: int) -> int:
        tensor: int = getattr(self.g, f"ggml_new_tensor_{form}")(self.ctx, type_id, *ne)
        self._bind(tensor, slot)
        return tensor

    def _bind(self, tensor: int, slot: tuple[str, int]) -> None:
        """Make `tensor` live where the binding `slot` will say."""
        base = _STAND_IN + len(self.out.slots) * _STAND_IN_STEP
        pointer = self.g.pointer(tensor)
        pointer.value = base
        self.out.slots[slot] = [Pointer(pointer, 0)]
        self.roots[tensor] = (slot, base)

    def _view(self, tensor: int, source: int) -> int:
        """Let `tensor`, just made as a view of `source`, follow the binding of `source` if that has one."""
        root = self.roots.get(source)
        if root is not None:
            slot, base = root
            pointer = self.g.pointer(tensor)
            self.out.slots[slot].append(Pointer(pointer, (pointer.value or 0) - base))
            self.roots[tensor] = root
        return tensor

    def _shared(self, slot: tuple[str, int], form: str, type_id: int, *ne: int) -> int:
        if slot not in self.shared:
            self.shared[slot] = self._leaf(slot, form, type_id, *ne)
        return self.shared[slot]

    def _weights(self, op: Op) -> list[int]:
        tensors = []
        for weight in op.weights:
            rows = self.shape.n_tokens if op.kind == "embed" else weight.rows
            tensors.append(self._leaf(("weights", self.weight), "2d", int(weight.type), weight.width, rows))
            self.weight += 1
        return tensors

    # --- values: contiguous float32, reshaped where they are used

    def _set(self, value: int, tensor: int, form: tuple[int, ...]) -> None:
        self.tensors[value], self.forms[value] = tensor, form

    def _result(self, op: Op, tensor: int, form: tuple[int, ...] | None = None) -> None:
        """Record the tensor that computes `op`; an output of the segment is computed right in its place."""
        info = self.segment.values[op.output]
        if op.output in self.segment.outputs:
            self._bind(tensor, ("outputs", self.segment.outputs.index(op.output)))
        self._set(op.output, tensor, form or (info.width, self.shape.rows(info.per)))

    def _matrix(self, value: int) -> int:
        info = self.segment.values[value]
        return self._as(value, (info.width, self.shape.rows(info.per)))

    def _heads(self, value: int, n_heads: int) -> int:
        info = self.segment.values[value]
        return self._as(value, (info.width // n_heads, n_heads, self.shape.rows(info.per)))

    def _as(self, value: int, form: tuple[int, ...]) -> int:
        tensor = self.tensors[value]
        if self.forms[value] == form:
            return tensor
        reshape = self.g.ggml_reshape_2d if len(form) == 2 else self.g.ggml_reshape_3d
        return self._view(reshape(self.ctx, tensor, *form), tensor)

    # --- operations, by the names of edgelm.engine.ir.Op

    def _embed(self, op: Op) -> None:
        (rows,) = self._weights(op)
        order = self._shared(("order", 0), "1d", TYPE_I32, self.shape.n_tokens)
        self._result(op, self.g.ggml_get_rows(self.ctx, rows, order))

    def _rms_norm(self, op: Op) -> None:
        assert isinstance(op.params, NormSpec)
        info = self.segment.values[op.output]
        x = self._heads(op.inputs[0], op.params.groups) if op.params.groups > 1 else self._matrix(op.inputs[0])
        y = self.g.ggml_rms_norm(self.ctx, x, op.params.eps)
        for scale in self._weights(op):
            y = self.g.ggml_mul(self.ctx, y, scale)
        rows = self.shape.rows(info.per)
        grouped = (info.width // op.params.groups, op.params.groups, rows)
        self._result(op, y, grouped if op.params.groups > 1 else None)

    def _layer_norm(self, op: Op) -> None:
        assert isinstance(op.params, NormSpec)
        scale, bias = self._weights(op)
        y = self.g.ggml_norm(self.ctx, self._matrix(op.inputs[0]), op.params.eps)
        self._result(op, self.g.ggml_add(self.ctx, self.g.ggml_mul(self.ctx, y, scale), bias))

    def _linear(self, op: Op) -> None:
        matrix, *bias = self._weights(op)
        x, form, n_rows = self._matrix(op.inputs[0]), None, self.shape.rows(self.segment.values[op.output].per)
        if self.shape.verified and n_rows > 1:  # row by row, see `_attend`
            width = self.segment.values[op.inputs[0]].width
            x = self._view(self.g.ggml_reshape_3d(self.ctx, x, width, 1, n_rows), x)
            form = self.segment.values[op.output].width, 1, n_rows
        y = self.g.ggml_mul_mat(self.ctx, matrix, x)
        for vector in bias:
            y = self.g.ggml_add(self.ctx, y, vector)
        self._result(op, y, form)

    def _concat(self, op: Op) -> None:
        tensor = self._matrix(op.inputs[0])
        for value in op.inputs[1:]:
            tensor = self.g.ggml_concat(self.ctx, tensor, self._matrix(value), 0)
        self._result(op, tensor)

    def _slice(self, op: Op) -> None:
        assert isinstance(op.params, Columns)
        start, width = op.params
        info = self.segment.values[op.inputs[0]]
        x = self._matrix(op.inputs[0])
        view = self.g.ggml_view_2d(self.ctx, x, width, self.shape.rows(info.per), info.width * 4, start * 4)
        self._result(op, self.g.ggml_cont(self.ctx, self._view(view, x)))

    def _add(self, op: Op) -> None:
        self._result(op, self.g.ggml_add(self.ctx, *(self._matrix(value) for value in op.inputs)))

    def _mul(self, op: Op) -> None:
        self._result(op, self.g.ggml_mul(self.ctx, *(self._matrix(value) for value in op.inputs)))

    def _gate(self, op: Op) -> None:
        gate = self.g.ggml_swiglu_split if op.params == "silu" else self.g.ggml_geglu_split
        self._result(op, gate(self.ctx, *(self._matrix(value) for value in op.inputs)))

    def _activate(self, op: Op) -> None:
        activate = self.g.ggml_silu if op.params == "silu" else self.g.ggml_gelu
        self._result(op, activate(self.ctx, self._matrix(op.inputs[0])))

    def _add_row(self, op: Op) -> None:
        (table,) = self._weights(op)
        width, size = op.weights[0].width, row_bytes(op.weights[0].type, op.weights[0].width)
        row = self._view(self.g.ggml_view_2d(self.ctx, table, width, 1, size, 0), table)
        if op.weights[0].type != TensorType.F32:
            row = self.g.ggml_cast(self.ctx, row, TYPE_F32)
        self._result(op, self.g.ggml_add(self.ctx, self._matrix(op.inputs[0]), row))

    def _add_positions(self, op: Op) -> None:
        (table,) = self._weights(op)
        positions = self._shared(("positions", 0), "1d", TYPE_I32, self.shape.n_tokens)
        rows = self.g.ggml_get_rows(self.ctx, table, positions)
        self._result(op, self.g.ggml_add(self.ctx, self._matrix(op.inputs[0]), rows))

    def _scale(self, op: Op) -> None:
        self._result(op, self.g.ggml_scale(self.ctx, self._matrix(op.inputs[0]), op.params))

    def _softcap(self, op: Op) -> None:
        assert isinstance(op.params, float)
        self._result(op, self._capped(self._matrix(op.inputs[0]), op.params))

    def _capped(self, x: int, cap: float) -> int:
        bounded = self.g.ggml_tanh(self.ctx, self.g.ggml_scale(self.ctx, x, 1 / cap))
        return int(self.g.ggml_scale(self.ctx, bounded, cap))

    def _select(self, op: Op) -> None:
        rows = self._shared(("out_rows", 0), "1d", TYPE_I32, self.shape.n_outputs)
        self._result(op, self.g.ggml_get_rows(self.ctx, self._matrix(op.inputs[0]), rows))

    def _rope(self, op: Op) -> None:
        spec = op.params
        assert isinstance(spec, RopeSpec)
        positions = self._shared(("positions", 0), "1d", TYPE_I32, self.shape.n_tokens)
        factors = self._weights(op)
        y = self.g.ggml_rope_ext(
            self.ctx,
            self._heads(op.inputs[0], spec.n_heads),
            positions,
            factors[0] if factors else None,
            spec.n_dims,
            ROPE_NEOX if spec.neox else ROPE_NORMAL,
            spec.n_ctx_orig,
            spec.base,
            spec.freq_scale,
            spec.ext_factor,
            spec.attn_factor,
            spec.beta_fast,
            spec.beta_slow,
        )
        width = self.segment.values[op.output].width
        self._result(op, y, (width // spec.n_heads, spec.n_heads, self.shape.n_tokens))

    def _attend(self, op: Op) -> None:
        spec = op.params
        assert isinstance(spec, AttendSpec)
        g, ctx, n_tokens = self.g, self.ctx, self.shape.n_tokens
        keys, values = self._write_cache(op, spec)
        mask = self._shared(("masks", spec.group), "2d", TYPE_F32, self.shape.groups[spec.group].length, n_tokens)
        source = self._heads(op.inputs[0], spec.n_heads)
        key_item, value_item = self.shape.cache.items
        if is_quantized(key_item):  # a product with blocks would round the queries to 8 bits, too
            keys = g.ggml_cast(ctx, keys, TYPE_F32)
        if is_quantized(value_item):
            self._attend_fused(op, spec, source, keys, values, mask)
            return
        # rows that are verified are computed one by one, as in passes of one: products of several at once add up in
        # another order, and 8-bit activations can make half a logit of that
        apart = self.shape.verified and n_tokens > 1
        if apart:
            q = self._view(g.ggml_reshape_4d(ctx, source, spec.head_dim_k, 1, spec.n_heads, n_tokens), source)
            length = self.shape.groups[spec.group].length
            mask = self._view(g.ggml_reshape_4d(ctx, mask, length, 1, 1, n_tokens), mask)
        else:
            q = self._view(g.ggml_permute(ctx, source, 0, 2, 1, 3), source)
        scores = g.ggml_mul_mat(ctx, keys, q)
        if spec.softcap:
            if spec.scale != 1.0:
                scores = g.ggml_scale(ctx, scores, spec.scale)
            weights = g.ggml_soft_max_ext(ctx, self._capped(scores, spec.softcap), mask, 1.0, 0.0)
        else:
            weights = g.ggml_soft_max_ext(ctx, scores, mask, spec.scale, 0.0)
        mixed = g.ggml_mul_mat(ctx, values, weights)
        if apart:
            self._result(op, mixed, (spec.head_dim_v, spec.n_heads, n_tokens))
            return
        mixed = g.ggml_permute(ctx, mixed, 0, 2, 1, 3)
        self._result(op, g.ggml_cont_2d(ctx, mixed, spec.n_heads * spec.head_dim_v, n_tokens))

    def _attend_fused(self, op: Op, spec: AttendSpec, source: int, keys: int, values: int, mask: int) -> None:
        """Mix values that lie as keys do, row by row; prompts in tiles, for which ggml wants float32 on both sides."""
        g, ctx, n_tokens = self.g, self.ctx, self.shape.n_tokens
        if n_tokens >= _TILE_ROWS and not self.shape.verified:
            keys = keys if is_quantized(self.shape.cache.items[0]) else g.ggml_cast(ctx, keys, TYPE_F32)
            values = g.ggml_cast(ctx, values, TYPE_F32)
        if spec.group not in self.half_masks:
            self.half_masks[spec.group] = g.ggml_cast(ctx, mask, TYPE_F16)
        q = self._view(g.ggml_permute(ctx, source, 0, 2, 1, 3), source)
        half = self.half_masks[spec.group]
        mixed = g.ggml_flash_attn_ext(ctx, q, keys, values, half, spec.scale, 0.0, spec.softcap)
        self._result(op, mixed, (spec.head_dim_v, spec.n_heads, n_tokens))

    def _encode(self, op: Op) -> None:
        spec = op.params
        assert isinstance(spec, EncodeSpec)
        g, ctx, turned = self.g, self.ctx, []
        for value, heads in zip(op.inputs, (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads), strict=True):
            by_head = self._heads(value, heads)
            turned.append(self._view(g.ggml_permute(ctx, by_head, 0, 2, 1, 3), by_head))
        # not fused: all scores are in memory, which the plan counts, and the sums are llama.cpp's to the last bit
        q, k, v = turned
        weights = g.ggml_soft_max_ext(ctx, g.ggml_mul_mat(ctx, k, q), self._band(spec.window), spec.scale, 0.0)
        columns = g.ggml_cont(ctx, self._view(g.ggml_permute(ctx, v, 1, 0, 2, 3), v))
        mixed = g.ggml_permute(ctx, g.ggml_mul_mat(ctx, columns, weights), 0, 2, 1, 3)
        self._result(op, g.ggml_cont_2d(ctx, mixed, spec.n_heads * spec.head_dim_v, self.shape.n_tokens))

    def _band(self, window: int) -> int | None:
        """Return the mask [n_tokens, n_tokens] of rows that see `window // 2` on either side; None if they see all.

        It is computed in the graph, so that the plan counts it as scratch memory.
        """
        g, ctx, n, reach = self.g, self.ctx, self.shape.n_tokens, window // 2
        if not window or reach >= n - 1:
            return None
        if window not in self.bands:
            places = g.ggml_arange(ctx, 0.0, float(n), 1.0)
            columns = g.ggml_repeat(ctx, places, g.ggml_new_tensor_2d(ctx, TYPE_F32, n, n))
            away = g.ggml_abs(ctx, g.ggml_sub(ctx, columns, g.ggml_reshape_2d(ctx, places, 1, n)))
            least = g.ggml_arange(ctx, -reach - 0.5, -reach + 0.5, 1.0)  # one number, halfway to the next distance
            self.bands[window] = g.ggml_scale(ctx, g.ggml_step(ctx, g.ggml_add(ctx, away, least)), _UNSEEN)
        return self.bands[window]

    def _write_cache(self, op: Op, spec: AttendSpec) -> tuple[int, int]:
        """Append the new keys and values; return the parts of the caches that the pass may see."""
        g, ctx, n_tokens, heads = self.g, self.ctx, self.shape.n_tokens, spec.n_kv_heads
        group = self.shape.groups[spec.group]
        places = self._shared(("places", spec.group), "1d", TYPE_I64, n_tokens)
        key_item, value_item = self.shape.cache.items
        seen_keys = self._write_rows("keys", key_item, op.inputs[1], spec, spec.head_dim_k)
        if is_quantized(value_item):  # these lie as the keys do
            return seen_keys, self._write_rows("values", value_item, op.inputs[2], spec, spec.head_dim_v)
        # values lie with the places innermost: rows of one number each are set, as llama.cpp does
        width = heads * spec.head_dim_v
        v = self._matrix(op.inputs[2])
        v = self._view(g.ggml_view_3d(ctx, v, 1, n_tokens, width, width * 4, 4, 0), v)
        values = self._leaf(("values", spec.layer), "3d", TYPE_F16, group.capacity, spec.head_dim_v, heads)
        cells = self._view(g.ggml_view_3d(ctx, values, 1, group.capacity, width, 2, group.capacity * 2, 0), values)
        stored = self._view(g.ggml_set_rows(ctx, cells, v, places), cells)
        g.ggml_build_forward_expand(self.out.graph, stored)

        row, head = group.capacity * 2, spec.head_dim_v * group.capacity * 2
        seen_values = g.ggml_view_3d(ctx, values, group.length, spec.head_dim_v, heads, row, head, 0)
        return seen_keys, self._view(seen_values, values)

    def _write_rows(self, slot: str, item: Item, value: int, spec: AttendSpec, dim: int) -> int:
        """Append the new vectors of a cache that lies [head, place, dimension]; return the part that the pass sees."""
        g, ctx, heads, group = self.g, self.ctx, spec.n_kv_heads, self.shape.groups[spec.group]
        places = self._shared(("places", spec.group), "1d", TYPE_I64, self.shape.n_tokens)
        new = g.ggml_permute(ctx, self._heads(value, heads), 0, 2, 1, 3)
        self._view(new, self.tensors[value])
        cache = self._leaf((slot, spec.layer), "3d", CACHE_TYPES[item], dim, group.capacity, heads)
        stored = self._view(g.ggml_set_rows(ctx, cache, new, places), cache)
        g.ggml_build_forward_expand(self.out.graph, stored)
        row = vector_bytes(item, dim)
        seen = g.ggml_view_3d(ctx, cache, dim, group.length, heads, row, row * group.capacity, 0)
        return self._view(seen, cache)
