"""A published ONNX model as ONNX Runtime computes it: one session, every tensor bound to memory of the caller's.

Decides nothing about memory; `graph_memory` says what the session will take.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgelm.engine.backend import GraphBuffers, GraphMemory
from edgelm.errors import Cancelled, ModelFileError, UnsupportedModel
from edgelm.files.graph import GraphModel, Port
from edgelm_onnx.graph_memory import graph_memory, scratch_bytes
from edgelm_onnx.huge_pages import collapse_since, regions
from edgelm_onnx.runtime import library, set_threads

_FATAL = 4  # ONNX Runtime would write to stderr what its exceptions say anyway
_MEANS_UNSUPPORTED = ("NotImplemented", "NoModel", "EPFail")
_HINT = "download the whole folder again, or get a newer onnxruntime"
_MOST_WORDS = 300
_ITEMS = {"float32": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32}


class OnnxGraphSession:
    """`edgelm.engine.backend.GraphSession` on the CPU. `run` may not be called from two threads at once."""

    def __init__(self, model: GraphModel, n_threads: int) -> None:
        self._lib, self._model, self._n_threads = library(), model, n_threads
        self._device = self._lib.OrtDevice(self._lib.OrtDevice.cpu(), self._lib.OrtDevice.default_memory(), 0)
        self._run_options = self._lib.RunOptions()
        self._run_options.log_severity_level = _FATAL
        self._session: Any = None
        self._aborted = False
        self._bound_tokens = 0

    def memory(self) -> GraphMemory:
        return graph_memory(self._model.graph, self._n_threads)

    def scratch_bytes(self, n_tokens: int, context: int) -> int:
        return scratch_bytes(self._model, n_tokens, context)

    def load(self) -> None:
        path, lib = self._model.graph.path, self._lib
        options = lib.SessionOptions()
        set_threads(options, self._n_threads)
        options.log_severity_level = _FATAL
        # an arena keeps the largest pass for ever, and patterns are kept for every length that the mask ever had
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        before = regions()
        try:
            self._session = lib.InferenceSession(options, str(path), True, False)
            self._session.initialize_session(["CPUExecutionProvider"], [{}], set())
        except Exception as exc:  # the library's exceptions have no base of their own
            self._session = None
            if type(exc).__name__ in _MEANS_UNSUPPORTED:
                raise UnsupportedModel(f"{path}: ONNX Runtime does not run this graph ({_said(exc)})") from exc
            raise ModelFileError(path, f"ONNX Runtime cannot load the graph ({_said(exc)})", _HINT) from exc
        collapse_since(before)
        self._binding = lib.SessionIOBinding(self._session)

    def bind(self, buffers: GraphBuffers) -> None:
        self._buffers = buffers
        if self._model.cache_in_place:
            self._bind_caches(0, 0, 0)

    def run(self, n_tokens: int, n_past: int, side: int) -> None:
        model, buffers = self._model, self._buffers
        inputs = model.graph.inputs
        if not model.cache_in_place:
            self._bind_caches(side, n_past, n_tokens)
        if n_tokens != self._bound_tokens:
            self._bound_tokens = n_tokens
            self._input(inputs[model.ids], (1, n_tokens), buffers.ids)
            rows = 1 if model.sees_last else n_tokens
            self._output(model.graph.outputs[model.logits], (1, rows, model.n_vocab), buffers.logits)
        self._input(inputs[model.mask], (1, n_past + n_tokens), buffers.mask)
        if model.positions is not None:
            port = inputs[model.positions]
            self._input(port, (1, n_tokens), buffers.positions + n_past * np.dtype(port.type).itemsize)
        try:
            self._session.run_with_iobinding(self._binding, self._run_options)
        except Exception as exc:
            if self._aborted:
                raise Cancelled("the generation was stopped") from exc
            raise UnsupportedModel(
                f"{model.graph.path}: ONNX Runtime could not compute the graph ({_said(exc)}); try another export"
            ) from exc

    def abort(self, on: bool) -> None:
        self._aborted = on
        self._run_options.terminate = on

    def close(self) -> None:
        self._binding = self._session = None

    def _bind_caches(self, side: int, n_past: int, n_tokens: int) -> None:
        """Bind what is read and what is written: the same memory where tokens are added in place."""
        model, buffers, graph = self._model, self._buffers, self._model.graph
        before, after = (n_past, n_past + n_tokens) if not model.cache_in_place else (buffers.context,) * 2
        old, new = buffers.caches[side], buffers.caches[(side + 1) % len(buffers.caches)]
        for names, read, written in zip(model.layers, old, new, strict=True):
            for name, address in zip((names.past_key, names.past_value), read, strict=True):
                self._input(graph.inputs[name], (1, model.n_kv_heads, before, model.head_dim), address)
            for name, address in zip((names.present_key, names.present_value), written, strict=True):
                self._output(graph.outputs[name], (1, model.n_kv_heads, after, model.head_dim), address)

    def _input(self, port: Port, shape: tuple[int, ...], address: int) -> None:
        self._binding.bind_input(port.name, self._device, _ITEMS[port.type], shape, address)

    def _output(self, port: Port, shape: tuple[int, ...], address: int) -> None:
        self._binding.bind_output(port.name, self._device, _ITEMS[port.type], shape, address)


def _said(exc: Exception) -> str:
    return " ".join(str(exc).split())[:_MOST_WORDS]
