"""The operations a model is recorded into, and the segments that backends compile.

Values are matrices of float32, one row per token of the pass (`per == "token"`) or per row whose logits are
wanted (`per == "output"`), `width` numbers a row. Weights are ggml tensors: `rows` rows of `width` weights.
Knows no file, no memory and no backend. Named tuples, not dataclasses: thousands are made, compared and hashed while a
model is opened, and the classes themselves cost a fifth to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from edgelm.files.ggml_types import TensorType

Per = Literal["token", "output"]
Activation = Literal["silu", "gelu"]


class Weight(NamedTuple):
    """Rows `first_row` … `first_row + rows - 1` of a tensor, each `width` weights of `type`.

    In a canonical segment `tensor` is empty: the address comes with the bindings.
    """

    tensor: str
    type: TensorType
    width: int
    rows: int
    first_row: int = 0


class Value(NamedTuple):
    width: int
    per: Per


class NormSpec(NamedTuple):
    """RMS or layer norm over `width / groups` numbers at a time (`groups` > 1: a norm for each head)."""

    eps: float
    groups: int = 1


class RopeSpec(NamedTuple):
    """Rotary position embedding as ggml_rope_ext defines it (RoPE, arXiv:2104.09864; YaRN, arXiv:2309.00071).

    `neox`: pairs are (i, i + n_dims/2), otherwise (2i, 2i+1). `freq_scale` is 1 / the linear factor.
    `ext_factor` 0 switches the YaRN ramp off; `n_ctx_orig` is the context of the training.
    Frequencies are divided by the op's weight (`n_dims/2` float32 factors) if it has one.
    """

    n_heads: int
    n_dims: int
    neox: bool
    base: float
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_ctx_orig: int = 0


class AttendSpec(NamedTuple):
    """Causal attention of `n_heads` query heads over the cache of `layer`, which it first extends by k and v.

    `window` > 0: position p sees p - window + 1 … p. `softcap` > 0: scores become cap * tanh(score / cap)
    (applied after `scale`). `group` numbers the cache groups: layers with the same window share masks.
    """

    layer: int
    n_heads: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    group: int = 0


class EncodeSpec(NamedTuple):
    """Attention of `n_heads` query heads among the rows of the pass. Nothing is cached.

    Each row sees all of them, or with `window` > 0 those at most `window // 2` rows away on either side.
    """

    n_heads: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    scale: float
    window: int = 0


class Columns(NamedTuple):
    start: int
    width: int


Params = NormSpec | RopeSpec | AttendSpec | EncodeSpec | Columns | float | str | None


class Op(NamedTuple):
    """One operation. `kind` decides what `inputs`, `weights` and `params` mean:

    | kind     | inputs    | weights          | params              | output                                    |
    |----------|-----------|------------------|---------------------|-------------------------------------------|
    | embed    |           | gathered rows    |                     | row t of the weight, as float32           |
    | rms_norm | x         | [scale]          | NormSpec            | x / rms(x) * scale                        |
    | layer_norm | x       | scale, bias      | NormSpec            | (x - mean) / deviation * scale + bias     |
    | linear   | x         | matrix, [bias]   |                     | x W^T + bias                              |
    | concat   | tiles     |                  |                     | columns side by side                      |
    | slice    | x         |                  | Columns             | some columns of x                         |
    | add, mul | a, b      |                  |                     | elementwise                               |
    | gate     | g, u      |                  | "silu" or "gelu"    | act(g) * u (gelu: the tanh form)          |
    | activate | x         |                  | "silu" or "gelu"    | act(x)                                    |
    | scale    | x         |                  | float               | x * float                                 |
    | softcap  | x         |                  | float               | cap * tanh(x / cap)                       |
    | rope     | x         | [factors]        | RopeSpec            | x rotated by the positions of the pass    |
    | attend   | q, k, v   |                  | AttendSpec          | attention, heads side by side             |
    | encode   | q, k, v   |                  | EncodeSpec          | attention among the rows of the pass      |
    | add_row  | x         | table            |                     | x + the first row of a small table        |
    | add_positions | x    | table            |                     | x + the rows of the pass's positions      |
    | select   | x         |                  |                     | the rows of x whose logits are wanted     |
    """

    kind: str
    inputs: tuple[int, ...]
    output: int
    weights: tuple[Weight, ...] = ()
    params: Params = None


SMALL_TABLES = frozenset({"add_row", "add_positions"})
"""Operations on tables of several rows that are kept like vectors, not streamed as matrices."""


class Segment(NamedTuple):
    """A run of operations in canonical form: equal segments differ only in what they are bound to.

    Value ids count up from 0 in order of appearance, weights carry no names, layers count up from 0.
    `inputs` and `outputs` are the ids of the values that come from and go to memory; `values[i]` describes id i;
    `weights` lists the weights in the order of the operations.
    """

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[Weight, ...]
    n_layers: int


class Placed(NamedTuple):
    """A segment and what its canonical names stand for in the model."""

    segment: Segment
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[Weight, ...]
    layers: tuple[int, ...]


class Trace(NamedTuple):
    """A whole model, recorded: operations in pass order and the values they make. `logits` is the last value."""

    ops: tuple[Op, ...]
    values: Mapping[int, Value]
    logits: int

    @property
    def attends(self) -> tuple[AttendSpec, ...]:
        """The attention of every layer, in order."""
        return tuple(op.params for op in self.ops if isinstance(op.params, AttendSpec))

    def weights(self) -> tuple[Weight, ...]:
        """Every weight in the order of its first use."""
        return tuple(dict.fromkeys(weight for op in self.ops for weight in op.weights))


def place(ops: Iterable[Op], values: Mapping[int, Value], live_after: frozenset[int]) -> Placed:
    """Return `ops` as a canonical segment. `live_after`: the values that later operations still read."""
    ops = tuple(ops)
    local: dict[int, int] = {}
    made: set[int] = set()
    layers: dict[int, int] = {}
    weights: list[Weight] = []
    inputs: list[int] = []
    canonical: list[Op] = []
    for op in ops:
        for value in op.inputs:
            if value not in local:
                inputs.append(value)
                local[value] = len(local)
        local.setdefault(op.output, len(local))
        made.add(op.output)
        params = op.params
        if isinstance(params, AttendSpec):
            params = params._replace(layer=layers.setdefault(params.layer, len(layers)))
        weights.extend(op.weights)
        canonical.append(
            Op(
                op.kind,
                tuple(local[value] for value in op.inputs),
                local[op.output],
                tuple(Weight("", weight.type, weight.width, weight.rows) for weight in op.weights),
                params,
            )
        )
    outputs = tuple(value for value in made & live_after)
    outputs = tuple(sorted(outputs, key=local.__getitem__))
    segment = Segment(
        tuple(canonical),
        tuple(values[value] for value in local),
        tuple(local[value] for value in inputs),
        tuple(local[value] for value in outputs),
        tuple(weight for op in canonical for weight in op.weights),
        len(layers),
    )
    return Placed(segment, tuple(inputs), outputs, tuple(weights), tuple(layers))
