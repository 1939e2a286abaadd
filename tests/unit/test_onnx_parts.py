"""The parts of the ONNX Runtime backend: its writer of models, its pieces, fused attention, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

import edgelm_onnx
from edgelm.engine.backend import Bindings, CacheGroup, PassShape
from edgelm.engine.health import check
from edgelm.engine.ir import AttendSpec, Op, Segment, Value, Weight
from edgelm.errors import BackendUnavailable, UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo
from edgelm.testing import reference
from edgelm.testing.backend_contract import nmse
from edgelm.testing.recording import Recording
from edgelm_onnx import kernels, proto
from edgelm_onnx.layout import OnnxLayout
from edgelm_onnx.pieces import cut
from edgelm_onnx.session import OnnxSession

CAPACITY = 512


@pytest.fixture(scope="module")
def session() -> Iterator[OnnxSession]:
    found = check("onnx")
    if not found.available:
        pytest.skip(f"onnx is not available here: {found.reason}")
    session = edgelm_onnx.BACKEND.open(2)
    yield session
    session.close()


def test_models_are_what_the_onnx_package_reads() -> None:
    onnx = pytest.importorskip("onnx", reason="needs the package onnx to compare with")
    attributes = {"axis": -1, "scale": 0.125, "mode": "tanh", "perm": (0, 2, 1)}
    node = proto.Node("Gelu", ("x", "c"), ("y",), attributes, "com.microsoft")
    ports = [proto.Port("x", proto.FLOAT, (1, "n", 300))], [proto.Port("y", proto.FLOAT16, (1, "n", 300))]
    constant = np.arange(6, dtype=np.int64).reshape(2, 3)
    stand = proto.Stand("s", proto.UINT8, (4, 2, 16), 128)
    model = onnx.load_from_string(proto.model([node], *ports, {"c": constant}, [stand]))
    assert {entry.domain: entry.version for entry in model.opset_import} == proto.OPSETS
    (read,) = model.graph.node
    assert (read.op_type, read.domain, [*read.input], [*read.output]) == ("Gelu", "com.microsoft", ["x", "c"], ["y"])
    values = {a.name: onnx.helper.get_attribute_value(a) for a in read.attribute}
    assert values == {"axis": -1, "scale": 0.125, "mode": b"tanh", "perm": [0, 2, 1]}
    first, second = model.graph.initializer
    assert np.array_equal(onnx.numpy_helper.to_array(first), constant)
    assert (list(second.dims), second.data_type, second.data_location) == ([4, 2, 16], proto.UINT8, 1)
    assert {e.key: e.value for e in second.external_data}["length"] == "128"
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [(dim.dim_value, dim.dim_param) for dim in dims] == [(1, ""), (0, "n"), (300, "")]
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


@pytest.mark.parametrize("dims", [(9, 3, 64), (4, 1, 256), (4, 2, 32)], ids=str)
@pytest.mark.parametrize("extra", [{}, {"softcap": 3.0}, {"window": 9}, {"window": 16, "softcap": 50.0}], ids=str)
def test_fused_attention(session: OnnxSession, dims: tuple[int, int, int], extra: dict[str, float]) -> None:
    """Keys and values of one length, which the contract suite has not; several passes, among them of one token."""
    heads, kv_heads, dim = dims
    spec = AttendSpec(0, heads, kv_heads, dim, dim, dim**-0.5, **extra)  # type: ignore[arg-type]
    cache = edgelm_onnx.BACKEND.capabilities().cache
    for n in (1, 7, 33):
        recording = Recording(n, capacity=160, length=128, cache=cache)
        q, k, v = (recording.value(width * size) for width, size in reference.attend_widths(spec))
        output = recording.ops.attend(q, k, v, spec)
        for first in range(0, 2 * n + 1, n):
            recording.move_to(first)
            (ours,) = recording.run(session, [output])
            assert nmse(ours, recording.exact_attend(q, k, v, spec)) < 1e-5
        for ours_cache, exact_cache in recording.caches(spec):
            assert np.array_equal(ours_cache, exact_cache)


@pytest.mark.parametrize("dims", [(9, 3, 64), (4, 2, 128), (4, 1, 256)], ids=str)
def test_a_cut_prompt_has_the_bits_of_a_whole_one(session: OnnxSession, dims: tuple[int, int, int]) -> None:
    heads, kv_heads, dim = dims
    spec = AttendSpec(0, heads, kv_heads, dim, dim, dim**-0.5)
    whole = attention_in_passes(session, spec, (70,))
    for passes in ((64, 6), (32, 38), (16, 54), (8, 62), (35, 35)):
        assert np.array_equal(attention_in_passes(session, spec, passes), whole), passes


def attention_in_passes(session: OnnxSession, spec: AttendSpec, passes: tuple[int, ...]) -> NDArray[np.float32]:
    dim, rng = spec.head_dim_k, np.random.default_rng(3)
    widths = [n * dim for n in (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)]
    rows = [rng.standard_normal((sum(passes), width)).astype(np.float32) for width in widths]
    cache = [np.zeros((spec.n_kv_heads, CAPACITY, dim), np.float16) for _ in range(2)]
    values = tuple(Value(width, "token") for width in (*widths, widths[0]))
    segment = Segment((Op("attend", (0, 1, 2), 3, (), spec),), values, (0, 1, 2), (3,), (), 1)
    results = []
    for first, n in zip(np.cumsum((0, *passes)), passes, strict=False):
        q, k, v = (np.ascontiguousarray(array[first : first + n]) for array in rows)
        out = np.zeros_like(q)
        positions = np.arange(first, first + n, dtype=np.int32)
        seen = np.arange(CAPACITY)[None, :] <= positions[:, None]
        mask = np.where(seen, np.float32(0), np.float32(-np.inf))
        places = positions.astype(np.int64)
        session.compile(segment, PassShape(n, 1, (CacheGroup(CAPACITY, CAPACITY),))).run(
            Bindings(
                inputs=tuple(array.ctypes.data for array in (q, k, v)),
                outputs=(out.ctypes.data,),
                weights=(),
                keys=(cache[0].ctypes.data,),
                values=(cache[1].ctypes.data,),
                positions=positions.ctypes.data,
                out_rows=positions.ctypes.data,
                places=(places.ctypes.data,),
                masks=(mask.ctypes.data,),
            )
        )
        results.append(out)
    return np.concatenate(results)


def test_layers_that_are_alike_share_a_graph_and_large_matrices_are_cut(session: OnnxSession) -> None:
    recording = Recording(1, capacity=64, length=64, layout=OnnxLayout())
    ops, x = recording.ops, recording.value(256)
    matrices = [recording.matrix(256, 256, TensorType.Q4_0) for _ in range(4)]
    for layer, matrix in enumerate(matrices):
        h = ops.linear(x, matrix)
        x = ops.add(x, ops.attend(h, h, h, AttendSpec(layer, 4, 4, 64, 64, 0.125)))
    segment, _ = recording.segment([ops.linear(x, Weight("head", TensorType.Q8_0, 256, 50_010))])
    pieces = cut(segment).pieces
    repeated = [piece for piece in pieces if piece.repeats]
    assert len(repeated) == 4
    assert len({piece.segment for piece in repeated}) == 1
    assert [piece.layers for piece in repeated] == [(0,), (1,), (2,), (3,)]
    kinds = [piece.segment.ops[0].kind for piece in pieces[4:]]
    assert kinds == ["linear", "linear", "left_over", "concat"]
    assert sum(piece.segment.ops[0].weights[0].rows for piece in pieces[4:-1]) == 50_010


def test_what_is_not_found_is_refused(session: OnnxSession) -> None:
    form = kernels.Form(32, 64, 4, 32)
    graph = kernels.products([form])
    (kernel,) = kernels.find_marked([form])
    assert kernel.n_bytes >= form.code_bytes
    pointers = kernels.Pointers(graph, [kernel])  # takes the mark away
    with pytest.raises(BackendUnavailable, match="not every matrix product"):
        kernels.find_marked([form])
    del pointers


def test_a_type_without_a_decoder_stays_in_the_file_and_is_refused(session: OnnxSession) -> None:
    kind = TensorType.IQ2_XXS
    assert OnnxLayout().packed(TensorInfo("m", kind, (256, 32), 0, 0, 32 * 66)) is None
    recording = Recording(1)
    with pytest.raises(UnsupportedModel, match="IQ2_XXS"):
        recording.run(session, [recording.ops.linear(recording.value(256), recording.matrix(256, 32, kind))])
