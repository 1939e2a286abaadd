"""Products that an execution provider of ONNX Runtime computes: one session of a fixed shape for each matrix.

The provider copies the weights when a session is made, so they cannot move afterwards, and what it holds is counted by
what was measured of one.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings, PassShape, Program
from edgelm.engine.ir import Segment, Weight
from edgelm.errors import BackendUnavailable
from edgelm.files.ggml_types import row_bytes as stored_row_bytes
from edgelm_npu.layout import TILE, row_bytes, tiles
from edgelm_npu.lowering import CHUNK
from edgelm_npu.numbers import Codes, Floats
from edgelm_npu.providers import Provider
from edgelm_npu.session import NpuSession
from edgelm_numpy.frame import at

HELD = 6
"""Bytes that a provider takes for each byte of an 8-bit matrix: OpenVINO 2025.4 on a processor took up to 5.3."""
LIBRARY_BYTES = 110_000_000
"""What its library takes when the first session is made: 90 MB there."""
_OPSET, _IR_VERSION = 13, 8


class CompiledProducts:
    """The sessions of one provider, one for each matrix."""

    def __init__(self, provider: Provider, options: dict[str, str]) -> None:
        """Raises `BackendUnavailable` if ONNX Runtime or the provider is not here, or has no such device."""
        self._provider, self._options = provider, options
        try:
            self._runtime = importlib.import_module("onnxruntime")
            importlib.import_module("onnx")
        except ImportError as exc:
            hint = f"install {provider.package} and onnx, or unset EDGELM_NPU for the simulated one"
            raise BackendUnavailable("npu", f"{provider.name}: {exc}", hint) from exc
        if provider.execution_provider not in self._runtime.get_available_providers():
            here = ", ".join(self._runtime.get_available_providers())
            raise BackendUnavailable(
                "npu", f"this ONNX Runtime has no {provider.execution_provider} ({here})", f"install {provider.package}"
            )
        self._sessions: dict[bytes, Any] = {}
        self._keys: dict[int, bytes] = {}  # of matrices, by where they lie
        weights = np.eye(TILE, dtype=np.int8)
        x = np.arange(CHUNK * TILE, dtype=np.float32).reshape(CHUNK, TILE) % 100
        if not np.allclose(self._run(self._compile(weights, np.ones(TILE, np.float32)), x), x, atol=0.1):
            raise BackendUnavailable("npu", f"{provider.name} computes wrong products here", "unset EDGELM_NPU")

    @property
    def version(self) -> str:
        device = self._options.get("device_type", "NPU")
        return f"{self._provider.name} on its {device}, ONNX Runtime {self._runtime.__version__}"

    def add(self, raw: NDArray[np.uint8], width: int, outputs: int) -> None:
        """Compile a packed matrix, which must lie there until `drop`; once, however often it is added."""
        key = hashlib.blake2b(raw.tobytes(), key=f"{width} x {outputs}".encode()).digest()
        if key not in self._sessions:
            self._sessions[key] = self._compile(*_unpacked(raw, width, outputs))
        self._keys[raw.ctypes.data] = key

    def drop(self, raw: NDArray[np.uint8]) -> None:
        key = self._keys.pop(raw.ctypes.data, None)
        if key is not None and key not in self._keys.values():
            del self._sessions[key]

    def multiply(self, raw: NDArray[np.uint8], codes: Floats, outputs: int) -> Floats:
        """Return the products [rows, outputs] of `codes` [rows, width], whole numbers, with a packed matrix.

        One that was not added is compiled for this once.
        """
        rows, width = codes.shape
        key = self._keys.get(raw.ctypes.data)
        session = self._compile(*_unpacked(raw, width, outputs)) if key is None else self._sessions[key]
        filled = np.zeros((CHUNK, width), np.float32)
        filled[:rows] = codes
        return self._run(session, filled)[:rows]

    def _run(self, session: Any, x: Floats) -> Floats:
        (made,) = session.run(None, {"x": x})
        return np.asarray(made, np.float32)

    def _compile(self, weights: Codes, scales: Floats) -> Any:
        options = self._runtime.SessionOptions()
        if not self._provider.falls_back:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.log_severity_level = 3
        model = _model(weights, scales, self._provider.graph)
        try:
            return self._session(model, options)
        except Exception as exc:  # each provider raises errors of its own
            said = str(exc).strip().splitlines()[-1]
            raise BackendUnavailable(
                "npu", f"{self._provider.name} refuses a product: {said}", "unset EDGELM_NPU"
            ) from exc

    def _session(self, model: bytes, options: Any) -> Any:
        providers = [(self._provider.execution_provider, self._options)]
        try:
            return self._runtime.InferenceSession(model, options, providers=providers)
        except RuntimeError as exc:
            if "use_per_session_threads" not in str(exc):
                raise
            options.use_per_session_threads = False  # the process has a pool, which all sessions must share then
            return self._runtime.InferenceSession(model, options, providers=providers)


class CompiledSession(NpuSession):
    """Products on a device that is here; outliers and all else on the processor. Weights are copied when they come."""

    def __init__(self, n_threads: int, products: CompiledProducts) -> None:
        super().__init__(n_threads)
        self.version = products.version
        self._products = self.host.compiled = products
        self._copies: dict[int, NDArray[np.uint8]] = {}
        self._next = itertools.count(-1, -1)

    def compile(self, segment: Segment, shape: PassShape) -> Program:
        return _Program(super().compile(segment, shape), self._copies)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        matrices = [op.weights[0] for op in segment.ops if op.kind == "linear"]
        held = HELD * sum(matrix.rows * row_bytes(matrix.width) for matrix in matrices)
        return super().scratch_bytes(segment, shape) + LIBRARY_BYTES + held

    def adopt(self, weight: Weight, address: int, matrix: bool) -> int:
        n_bytes = row_bytes(weight.width) if matrix else stored_row_bytes(weight.type, weight.width)
        copy = np.array(at(address, (weight.rows * n_bytes,), np.uint8))
        handle = next(self._next)
        self._copies[handle] = copy
        if matrix:
            self._products.add(copy, weight.width, weight.rows)
        return handle

    def drop(self, handle: int) -> None:
        self._products.drop(self._copies.pop(handle))


class _Program(NamedTuple):
    """A program that finds the session's copies of weights."""

    inner: Program
    copies: dict[int, NDArray[np.uint8]]

    def run(self, bindings: Bindings) -> None:
        places = (self.copies[at].ctypes.data if at < 0 else at for at in bindings.weights)
        self.inner.run(bindings._replace(weights=tuple(places)))


def _unpacked(raw: NDArray[np.uint8], width: int, outputs: int) -> tuple[Codes, Floats]:
    """Return the codes [outputs, width] and scales [outputs] of a packed matrix."""
    whole, tile_bytes = outputs // TILE, TILE * row_bytes(width)
    parts = [tiles(raw[: whole * tile_bytes].reshape(whole, tile_bytes), width)] if whole else []
    if outputs % TILE:
        parts.append(tiles(raw[whole * tile_bytes :].reshape(1, -1), width))
    codes = np.concatenate([part.reshape(-1, width) for part, _ in parts])
    return codes, np.concatenate([part.reshape(-1) for _, part in parts])


def _model(weights: Codes, scales: Floats, graph: str) -> bytes:
    """Return an ONNX model of one product, x [CHUNK, width] with the transpose of `weights` [outputs, width]."""
    from onnx import TensorProto, helper, numpy_helper

    outputs, width = weights.shape
    x, nodes = "x", []
    constants: dict[str, NDArray[Any]]
    if graph == "int8":
        constants = {
            "weights": np.ascontiguousarray(weights.T),
            "scales": scales,
            "zeros": np.zeros(outputs, np.int8),
            "step": np.array(1, np.float32),  # activations come as whole numbers
            "zero": np.array(128, np.uint8),
        }
        nodes = [
            helper.make_node("DequantizeLinear", ["weights", "scales", "zeros"], ["matrix"], axis=1),
            helper.make_node("QuantizeLinear", ["x", "step", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["numbers"]),
        ]
        x = "numbers"
    else:
        constants = {"matrix": np.ascontiguousarray((weights * scales[:, None]).T, np.float32)}
    nodes.append(helper.make_node("MatMul", [x, "matrix"], ["y"]))
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [CHUNK, n]) for name, n in (("x", width), ("y", outputs))
    ]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    made = helper.make_graph(nodes, "product", values[:1], values[1:], initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())
