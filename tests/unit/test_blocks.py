"""Weights become the same floats as in ggml, bit for bit, without large temporaries."""

from __future__ import annotations

import ctypes
import importlib.util
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgelm.errors import UnsupportedModel
from edgelm.files.blocks import TEMPORARY_BYTES, TYPES, dequantize
from edgelm.files.ggml_types import AFFINE_TYPES, TensorType, row_bytes
from edgelm.testing.blocks import RANDOM_TYPES, random_weights


class _Traits(ctypes.Structure):
    """The beginning of `struct ggml_type_traits`."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleaved", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    libraries = sorted(Path(spec.origin).parent.glob("lib/libggml-base.*")) if spec and spec.origin else []
    if not libraries:
        pytest.skip("llama-cpp-python is not installed")
    library = ctypes.CDLL(str(libraries[0]))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    return library


def bits_differ(ours: np.ndarray, theirs: np.ndarray) -> int:
    """How many floats differ in any bit; NaNs are alike."""
    alike = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    return int((~alike).sum())


@pytest.mark.parametrize("kind", sorted(TYPES - AFFINE_TYPES - {TensorType.F32}), ids=lambda kind: kind.name)
def test_any_bytes_become_what_ggml_makes_of_them(ggml: ctypes.CDLL, kind: TensorType) -> None:
    raw = np.random.default_rng(int(kind)).integers(0, 256, (50, row_bytes(kind, 1024)), dtype=np.uint8)
    traits = ggml.ggml_get_type_traits(int(kind)).contents
    assert (traits.block_size, traits.block_bytes) == (kind.block_size, kind.block_bytes)
    ours = dequantize(kind, raw)
    theirs = np.empty_like(ours)
    traits.to_float(raw.ctypes.data, theirs.ctypes.data, theirs.size)
    assert bits_differ(ours, theirs) == 0


@pytest.mark.parametrize("kind", sorted(TYPES & RANDOM_TYPES), ids=lambda kind: kind.name)
def test_weights_are_those_of_the_gguf_package(kind: TensorType) -> None:
    rng = np.random.default_rng(int(kind))
    raw = np.frombuffer(random_weights(kind, 20 * 512, 0.05, rng), np.uint8).reshape(20, -1)
    theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(kind)))
    assert bits_differ(dequantize(kind, raw), np.asarray(theirs, np.float32)) == 0


def test_output_and_rows_that_lie_apart() -> None:
    rng = np.random.default_rng(1)
    raw = np.frombuffer(random_weights(TensorType.Q4_K, 6 * 512, 0.05, rng), np.uint8).reshape(6, -1)
    whole = dequantize(TensorType.Q4_K, raw)
    out = np.full((3, 512), np.nan, np.float32)
    assert dequantize(TensorType.Q4_K, raw[2:5], out) is out
    assert np.array_equal(out, whole[2:5])


@pytest.mark.parametrize("kind", sorted(TYPES), ids=lambda kind: kind.name)
def test_temporaries_are_small(kind: TensorType) -> None:
    rows = 64
    raw = np.zeros((rows, row_bytes(kind, 1024)), np.uint8)
    out = np.empty((rows, 1024), np.float32)
    dequantize(kind, raw, out)
    tracemalloc.start()
    try:
        dequantize(kind, raw, out)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= TEMPORARY_BYTES * out.size + 4096


def test_a_type_without_decoder_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="IQ1_S"):
        dequantize(TensorType.IQ1_S, np.zeros((1, TensorType.IQ1_S.block_bytes), np.uint8))
