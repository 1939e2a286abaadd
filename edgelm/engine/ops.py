"""What an architecture file writes with: `Ops` records a model and checks every shape while it does.

An architecture is written once, on opaque tensors; shapes are checked here because ggml's own checks abort the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from edgelm.engine.ir import (
    Activation,
    AttendSpec,
    Columns,
    EncodeSpec,
    NormSpec,
    Op,
    Params,
    Per,
    RopeSpec,
    Trace,
    Value,
    Weight,
)
from edgelm.errors import UnsupportedModel
from edgelm.files.model import TensorInfo


class Tensor(NamedTuple):
    """An opaque value of the recording: `width` numbers a row."""

    id: int
    width: int
    per: Per


class Weights:
    """The tensors of a file under one prefix: `w["attn_q"]` is `blk.3.attn_q.weight`."""

    def __init__(self, tensors: Mapping[str, TensorInfo], prefix: str = "") -> None:
        self._tensors, self._prefix = tensors, prefix

    def block(self, layer: int) -> Weights:
        return Weights(self._tensors, f"blk.{layer}.")

    def __getitem__(self, name: str) -> Weight:
        weight = self.get(name)
        if weight is None:
            raise UnsupportedModel(f"the file has no tensor {self._full(name)!r}; it needs another version of edgelm")
        return weight

    def get(self, name: str) -> Weight | None:
        """Return the tensor, or None if the file does not have it. `name` may end in .bias; .weight is implied."""
        info = self._tensors.get(self._full(name))
        if info is None:
            return None
        if len(info.shape) > 2:
            raise UnsupportedModel(f"tensor {info.name!r} has shape {info.shape}; edgelm runs dense matrices only")
        return Weight(info.name, info.type, info.shape[0], info.n_rows)

    def __contains__(self, name: str) -> bool:
        return self._full(name) in self._tensors

    def _full(self, name: str) -> str:
        return f"{self._prefix}{name}" if name.endswith((".weight", ".bias")) else f"{self._prefix}{name}.weight"


class Ops:
    """Records operations. Every method checks shapes and raises `UnsupportedModel` if they do not fit."""

    def __init__(self) -> None:
        self._ops: list[Op] = []
        self._values: dict[int, Value] = {}
        self._windows: dict[int, int] = {}

    def trace(self, logits: Tensor) -> Trace:
        """Return everything recorded; `logits` is what the pass is for."""
        return Trace(tuple(self._ops), dict(self._values), logits.id)

    def embed(self, table: Weight) -> Tensor:
        """Rows of the embedding table, one per token of the pass: the store gathers them."""
        return self._add("embed", (), table.width, "token", (table,))

    def rms_norm(self, x: Tensor, scale: Weight | None, eps: float, groups: int = 1) -> Tensor:
        """RMSNorm (arXiv:1910.07467) of each of `groups` equal parts of a row, times `scale` if there is one."""
        if x.width % groups:
            raise UnsupportedModel(f"a norm of {groups} groups cannot divide rows of {x.width}")
        if scale is not None:
            self._check(scale, width=x.width // groups, rows=1)
        return self._add("rms_norm", (x,), x.width, x.per, _some(scale), NormSpec(eps, groups))

    def layer_norm(self, x: Tensor, scale: Weight, bias: Weight, eps: float) -> Tensor:
        """Layer normalization (arXiv:1607.06450) of each row."""
        for weight in (scale, bias):
            self._check(weight, width=x.width, rows=1)
        return self._add("layer_norm", (x,), x.width, x.per, (scale, bias), NormSpec(eps))

    def linear(self, x: Tensor, matrix: Weight, bias: Weight | None = None) -> Tensor:
        """`x W^T + bias`; `matrix` has one row for each output."""
        self._check(matrix, width=x.width)
        if bias is not None:
            self._check(bias, width=matrix.rows, rows=1)
        return self._add("linear", (x,), matrix.rows, x.per, (matrix, *_some(bias)))

    def slice(self, x: Tensor, start: int, width: int) -> Tensor:
        """Columns `start` … `start + width - 1`."""
        if start < 0 or width <= 0 or start + width > x.width:
            raise UnsupportedModel(f"columns {start}…{start + width} are outside rows of {x.width}")
        return self._add("slice", (x,), width, x.per, (), Columns(start, width))

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._pair("add", a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._pair("mul", a, b)

    def gate(self, gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
        """`activation(gate) * up` (GLU variants, arXiv:2002.05202)."""
        return self._pair("gate", gate, up, activation)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return self._add("activate", (x,), x.width, x.per, (), activation)

    def add_row(self, x: Tensor, table: Weight) -> Tensor:
        """Add the first row of a small table to every row."""
        self._check(table, width=x.width)
        return self._add("add_row", (x,), x.width, x.per, (table,))

    def add_positions(self, x: Tensor, table: Weight) -> Tensor:
        """Add to each row the row of its position in a small table: learned positions. `table` has one for each."""
        self._check(table, width=x.width)
        return self._add("add_positions", (x,), x.width, x.per, (table,))

    def scale(self, x: Tensor, factor: float) -> Tensor:
        return self._add("scale", (x,), x.width, x.per, (), float(factor))

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """`cap * tanh(x / cap)` (Gemma 2, arXiv:2408.00118)."""
        return self._add("softcap", (x,), x.width, x.per, (), float(cap))

    def rope(self, x: Tensor, spec: RopeSpec, factors: Weight | None = None) -> Tensor:
        """Rotate each of `spec.n_heads` heads by the row's position."""
        head_dim = x.width // spec.n_heads
        if x.width % spec.n_heads or spec.n_dims > head_dim or spec.n_dims % 2 or x.per != "token":
            raise UnsupportedModel(f"rope of {spec.n_dims} of {spec.n_heads} heads does not fit rows of {x.width}")
        if factors is not None:
            self._check(factors, width=spec.n_dims // 2, rows=1)
        return self._add("rope", (x,), x.width, x.per, _some(factors), spec)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, spec: AttendSpec) -> Tensor:
        """Append k and v to the cache of the layer and return the attention of q over it."""
        _check_heads(q, k, v, spec)
        group = self._windows.setdefault(spec.window, len(self._windows))
        spec = spec._replace(group=group)
        return self._add("attend", (q, k, v), spec.n_heads * spec.head_dim_v, "token", (), spec)

    def encode(self, q: Tensor, k: Tensor, v: Tensor, spec: EncodeSpec) -> Tensor:
        """Return the attention among the rows of the pass: a text is one pass, and nothing is cached."""
        _check_heads(q, k, v, spec)
        return self._add("encode", (q, k, v), spec.n_heads * spec.head_dim_v, "token", (), spec)

    def select(self, x: Tensor) -> Tensor:
        """The rows whose logits are wanted. Done in the last block, so that the rest computes no more than needed."""
        return self._add("select", (x,), x.width, "output")

    def _pair(self, kind: str, a: Tensor, b: Tensor, params: Params = None) -> Tensor:
        if (a.width, a.per) != (b.width, b.per):
            raise UnsupportedModel(f"{kind} of rows of {a.width} and {b.width} does not fit")
        return self._add(kind, (a, b), a.width, a.per, (), params)

    def _add(
        self,
        kind: str,
        inputs: tuple[Tensor, ...],
        width: int,
        per: Per,
        weights: tuple[Weight, ...] = (),
        params: Params = None,
    ) -> Tensor:
        output = len(self._values)
        self._values[output] = Value(width, per)
        self._ops.append(Op(kind, tuple(x.id for x in inputs), output, weights, params))
        return Tensor(output, width, per)

    @staticmethod
    def _check(weight: Weight, width: int, rows: int | None = None) -> None:
        if weight.width != width or (rows is not None and weight.rows != rows):
            raise UnsupportedModel(
                f"tensor {weight.tensor!r} is {weight.width} x {weight.rows}, "
                f"but the model needs {width} x {rows if rows is not None else 'n'}"
            )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, spec: AttendSpec | EncodeSpec) -> None:
    if (
        q.width != spec.n_heads * spec.head_dim_k
        or k.width != spec.n_kv_heads * spec.head_dim_k
        or v.width != spec.n_kv_heads * spec.head_dim_v
        or spec.n_heads % spec.n_kv_heads
        or {q.per, k.per, v.per} != {"token"}
    ):
        raise UnsupportedModel(f"attention of {spec} does not fit q, k, v of {q.width}, {k.width}, {v.width}")


def _some(weight: Weight | None) -> tuple[Weight, ...]:
    return () if weight is None else (weight,)
