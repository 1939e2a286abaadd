"""Prove on small numbers that products computed on bytes written by `edgelm_onnx.layout` are right.

Run when the backend is probed: another version of ONNX Runtime, or another processor, may lay bytes out otherwise.
"""

from __future__ import annotations

import numpy as np

from edgelm.errors import BackendUnavailable
from edgelm_onnx.kernels import ALIGNMENT, Form, Pointers, find_marked, products
from edgelm_onnx.layout import ROW_GROUP, packed_codes, put_minima
from edgelm_onnx.runtime import NAME

_TOLERANCE = 1e-3
"""Normalized squared error that activations of eight bits may cost; wrong floats cost more than 0.1."""


def prove() -> None:
    """Raises `BackendUnavailable` if a product comes out wrong, or if nothing is found where it should be."""
    rng = np.random.default_rng(0)
    for bits in (4, 8):
        for block in (16, 32):
            form = Form(3 * ROW_GROUP, 8 * block, bits, block)
            codes = rng.integers(0, 1 << bits, (form.rows, form.width), np.uint8)
            scales, minima = (rng.normal(0, 1, (form.rows, form.n_blocks)).astype(np.float32) for _ in range(2))
            minima *= np.float32(1 << bits)
            packed = packed_codes(form, codes, scales)
            if (len(packed) - form.code_bytes) % (form.rows * form.n_blocks * 4):
                raise BackendUnavailable(NAME, f"packed {bits}-bit matrices have a size that edgelm does not know")
            put_minima(form, packed, minima)
            several = [form._replace(rows=rows) for rows in (form.rows, 9 * ROW_GROUP, form.rows, 9 * ROW_GROUP)]
            graph = products(several)
            Pointers(graph, find_marked(several))  # refuses what it cannot tell apart
            exact = codes * np.repeat(scales, block, axis=1) + np.repeat(minima, block, axis=1)
            for n_tokens in (1, 2, 7):
                x = rng.normal(1, 1, (n_tokens, form.width)).astype(np.float32)
                wanted = x.astype(np.float64) @ exact.T.astype(np.float64)
                error = np.square(_product(form, packed, x) - wanted).sum() / np.square(wanted).sum()
                if not error <= _TOLERANCE:
                    raise BackendUnavailable(
                        NAME,
                        f"{bits}-bit products of {n_tokens} rows are wrong by {error:.0%} on this processor",
                        "use another version of onnxruntime, or another backend",
                    )


def _product(form: Form, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    memory = np.zeros(len(packed) + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    memory[start : start + len(packed)] = packed
    graph = products([form])
    pointers = Pointers(graph, find_marked([form]))
    pointers.set([memory.ctypes.data + start])
    y = np.zeros((len(x), form.rows), np.float32)
    binding = graph.binding()
    binding.take(
        [
            (True, "m0.x", np.float32, (1, *x.shape), x.ctypes.data),
            (False, "m0.y", np.float32, (1, *y.shape), y.ctypes.data),
        ]
    )
    graph.run(binding)
    return y
