"""Cutting a recorded model anywhere leaves its values as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgelm.engine.ir import AttendSpec, Op, Trace, Weight, place
from edgelm.engine.ops import Ops
from edgelm.engine.segments import Cut, cut
from edgelm.engine.state import Layout
from edgelm.files.ggml_types import TensorType
from edgelm.memory.units import Part, Unit

N_TOKENS, N_VOCAB, WIDTH, HIDDEN = 3, 96, 8, 40
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    tied: bool = False
    biases: bool = False
    tail: tuple[str, ...] = ()


VARIANTS = [
    Variant(),
    Variant(tied=True),
    Variant(biases=True),
    Variant(tail=("scale",)),
    Variant(tail=("softcap",), biases=True),
    Variant(tied=True, tail=("scale", "softcap")),
]


def weight(name: str, width: int, rows: int) -> Weight:
    return Weight(name, TensorType.F32, width, rows)


def record(variant: Variant) -> Trace:
    """Two small blocks (attention stands for itself: `attend` is only moved around here) and a head."""
    ops = Ops()
    table = weight("embed", WIDTH, N_VOCAB)
    x = ops.embed(table)

    def linear(x: object, name: str, width: int, rows: int) -> object:
        bias = weight(f"{name}.bias", rows, 1) if variant.biases else None
        return ops.linear(x, weight(name, width, rows), bias)  # type: ignore[arg-type]

    for i in range(2):
        h = ops.rms_norm(x, weight(f"{i}.norm", WIDTH, 1), 1e-5)
        q, k, v = (linear(h, f"{i}.{name}", WIDTH, rows) for name, rows in (("q", 64), ("k", 32), ("v", 32)))
        spec = AttendSpec(i, n_heads=4, n_kv_heads=2, head_dim_k=16, head_dim_v=16, scale=0.25)
        attended = ops.attend(q, k, v, spec)  # type: ignore[arg-type]
        x = ops.add(x, linear(attended, f"{i}.o", 64, WIDTH))  # type: ignore[arg-type]
        gate, up = linear(x, f"{i}.gate", WIDTH, HIDDEN), linear(x, f"{i}.up", WIDTH, HIDDEN)
        x = ops.add(x, linear(ops.scale(ops.gate(gate, up), 0.5), f"{i}.down", HIDDEN, WIDTH))  # type: ignore[arg-type]
    x = ops.select(ops.rms_norm(x, weight("norm", WIDTH, 1), 1e-5))
    logits = ops.linear(
        x,
        table if variant.tied else weight("head", WIDTH, N_VOCAB),
        weight("head.bias", N_VOCAB, 1) if variant.biases else None,
    )
    for kind in variant.tail:
        logits = ops.scale(logits, 1.7) if kind == "scale" else ops.softcap(logits, 2.0)
    return ops.trace(logits)


@cache
def numbers(tensor: str, shape: tuple[int, int]) -> Floats:
    return np.random.default_rng(list(tensor.encode())).standard_normal(shape) / np.sqrt(shape[1])


def run_ops(ops: Sequence[Op], values: dict[int, Floats], whole: Mapping[str, tuple[int, int]]) -> None:
    """Compute operations in float64: a few lines each, every weight cut out of its whole tensor."""
    for op in ops:
        args = [values[i] for i in op.inputs]
        weights = []
        for part in op.weights:
            tensor = numbers(part.tensor, whole[part.tensor])
            if tensor.shape[0] == 1:
                weights.append(tensor[0, part.first_row : part.first_row + part.width])
            else:
                weights.append(tensor[part.first_row : part.first_row + part.rows])
        match op.kind:
            case "embed":
                result = weights[0][[5, 1, 7]]
            case "rms_norm":
                result = args[0] / np.sqrt(np.square(args[0]).mean(axis=1, keepdims=True) + 1e-5) * weights[0]
            case "linear":
                # row by row, so that a cut cannot change the order of a sum
                result = np.stack([(args[0] * row).sum(axis=1) for row in weights[0]], axis=1)
                result = result + weights[1] if len(weights) > 1 else result
            case "attend":
                assert isinstance(op.params, AttendSpec)
                q, k, v = args
                result = q * np.tile(k, 2) + np.tile(v, 2) * (op.params.layer + 2)
            case "gate":
                result = args[0] / (1 + np.exp(-args[0])) * args[1]
            case "add":
                result = args[0] + args[1]
            case "scale":
                assert isinstance(op.params, float)
                result = args[0] * op.params
            case "softcap":
                assert isinstance(op.params, float)
                result = op.params * np.tanh(args[0] / op.params)
            case "select":
                result = args[0][1:]
            case "concat":
                result = np.concatenate(args, axis=1)
            case _:
                raise AssertionError(op.kind)
        values[op.output] = result


def shapes(trace: Trace) -> dict[str, tuple[int, int]]:
    return {weight.tensor: (weight.rows, weight.width) for weight in trace.weights()}


def run_cut(trace: Trace, made: Cut) -> Floats:
    """Run the segments as a backend does: canonical names, only inputs and outputs shared, through the layout."""
    layout, whole = Layout.of(made), shapes(trace)
    memory = np.full((layout.width, N_TOKENS), np.nan)
    tiles: dict[int, Floats] = {}
    logit_values = {tile.value for tile in made.tiles}
    for placed in made.segments:
        names = dict(enumerate(placed.weights))
        values = {}
        for local, value in zip(placed.segment.inputs, placed.inputs, strict=True):
            width, rows = made.values[value].width, N_TOKENS if made.values[value].per == "token" else N_TOKENS - 1
            at = layout.offsets[value]
            values[local] = memory[at : at + width, :rows].T.copy()
        count = iter(range(len(names)))
        ops = []
        for op in placed.segment.ops:
            params = op.params
            if isinstance(params, AttendSpec):
                params = AttendSpec(placed.layers[params.layer], 4, 2, 16, 16, 0.25)
            ops.append(Op(op.kind, op.inputs, op.output, tuple(names[next(count)] for _ in op.weights), params))
        run_ops(ops, values, whole)
        for local, value in zip(placed.segment.outputs, placed.outputs, strict=True):
            result = values[local]
            assert result.shape[1] == made.values[value].width == placed.segment.values[local].width
            if value in logit_values:
                tiles[value] = result
            else:
                at = layout.offsets[value]
                memory[at : at + result.shape[1], : result.shape[0]] = result.T
    assert sum(tile.width for tile in made.tiles) == N_VOCAB
    assert [tile.first for tile in made.tiles] == np.cumsum([0, *(tile.width for tile in made.tiles)])[:-1].tolist()
    return np.concatenate([tiles[tile.value] for tile in made.tiles], axis=1)


def matrices_of(trace: Trace) -> list[Weight]:
    used = dict.fromkeys(weight for op in trace.ops if op.kind != "embed" for weight in op.weights)
    return [weight for weight in used if weight.rows > 1]


def units_of(trace: Trace, cuts: Sequence[int]) -> list[Unit]:
    """Cut the rows of all matrices, in pass order, at these numbers of rows; a matrix may be in many units."""
    units: list[list[Part]] = [[]]
    at = 0
    for matrix in matrices_of(trace):
        inside = [c - at for c in cuts if at < c < at + matrix.rows]
        edges = [0, *inside, matrix.rows]
        for first, last in pairwise(edges):
            if units[-1] and at + first in cuts:
                units.append([])
            units[-1].append(
                Part(matrix.tensor, first, last - first, 0, 0, (last - first) * matrix.width * 4, matrix.width * 128)
            )
        at += matrix.rows
    return [Unit(tuple(parts), (), 0, 0) for parts in units]


def uncut(trace: Trace) -> Floats:
    values: dict[int, Floats] = {}
    run_ops(trace.ops, values, shapes(trace))
    return values[trace.logits]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_cut_anywhere_equals_uncut(variant: Variant, data: st.DataObject) -> None:
    trace = record(variant)
    n_rows = sum(matrix.rows for matrix in matrices_of(trace))
    cuts = sorted(data.draw(st.sets(st.integers(1, n_rows - 1), max_size=24)))
    made = cut(trace, units_of(trace, cuts))
    assert len(made.segments) == len(cuts) + 1
    assert np.array_equal(run_cut(trace, made), uncut(trace))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_tails_of_the_head_stay_in_its_tiles(variant: Variant) -> None:
    """Scaling and capping logits needs no whole row of them, so nothing as wide as the vocabulary is copied."""
    trace = record(variant)
    n_rows = sum(matrix.rows for matrix in matrices_of(trace))
    made = cut(trace, units_of(trace, [n_rows - 64, n_rows - 32]))
    assert [tile.width for tile in made.tiles] == [32, 32, 32]
    kinds = [[op.kind for op in placed.segment.ops] for placed in made.segments]
    assert kinds[1] == kinds[2] == ["linear", *variant.tail]
    assert not any("concat" in group for group in kinds)
    # one program serves all inner tiles
    assert made.segments[1].segment == made.segments[2].segment


def test_the_last_write_is_the_last_run_with_attention() -> None:
    trace = record(Variant())
    rows = [matrix.rows for matrix in matrices_of(trace)]
    cuts = np.cumsum(rows)[:-1].tolist()  # each matrix a unit
    made = cut(trace, units_of(trace, cuts))
    names = [matrix.tensor for matrix in matrices_of(trace)]
    assert names[made.last_write] == "1.v"


def test_equal_blocks_are_equal_segments() -> None:
    trace = record(Variant(biases=True))
    rows = [matrix.rows for matrix in matrices_of(trace)]
    made = cut(trace, units_of(trace, [sum(rows[:1]), sum(rows[:6]), sum(rows[:8]), sum(rows[:13])]))
    assert made.segments[1].segment == made.segments[3].segment
    assert made.segments[1].layers != made.segments[3].layers


def test_one_segment_is_the_model_itself() -> None:
    trace = record(Variant())
    made = cut(trace, units_of(trace, []))
    assert made.segments == (place(trace.ops, trace.values, frozenset([trace.logits])),)
    assert Layout.of(made).width == 0


def test_a_matrix_of_one_row_is_a_constant_and_no_reason_to_fail() -> None:
    ops = Ops()
    x = ops.embed(weight("embed", WIDTH, N_VOCAB))
    x = ops.linear(x, weight("narrow", WIDTH, 1))
    logits = ops.linear(x, weight("wide", 1, 64))
    made = cut(ops.trace(logits), [Unit((Part("wide", 0, 64, 0, 0, 256, 128),), (), 0, 0)])
    assert [op.kind for op in made.segments[0].segment.ops] == ["embed", "linear", "linear"]
