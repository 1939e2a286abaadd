"""Round numbers to the two block types that caches use, with ggml's own rounding (quantize_row_q8_0_ref, _q4_0_ref)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import TensorType

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
_BLOCK = 32


def to_q8_0(values: Floats) -> Bytes:
    """Return blocks of 32: a half-precision scale and 32 signed bytes. [..., n] -> [..., n / 32 * 34]."""
    blocks = values.reshape(-1, _BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, 1 / scale, 0).astype(np.float32)
    scaled = blocks * inverse
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)  # half away from zero
    out = np.empty((len(blocks), 34), np.uint8)
    out[:, :2] = scale.astype(np.float16).view(np.uint8)
    out[:, 2:] = rounded.view(np.uint8)
    return out.reshape(*values.shape[:-1], -1)


def to_q4_0(values: Floats) -> Bytes:
    """Return blocks of 32: a half-precision scale and 16 bytes of two numbers each. [..., n] -> [..., n / 32 * 18]."""
    blocks = values.reshape(-1, _BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    scale = largest / np.float32(-8)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale != 0, 1 / scale, 0).astype(np.float32)
    codes = np.minimum((blocks * inverse + np.float32(8.5)).astype(np.int8), 15).astype(np.uint8)
    out = np.empty((len(blocks), 18), np.uint8)
    out[:, :2] = scale.astype(np.float16).view(np.uint8)
    out[:, 2:] = codes[:, :16] | codes[:, 16:] << 4
    return out.reshape(*values.shape[:-1], -1)


def to_blocks(item: str, values: Floats) -> Bytes:
    """Round to the type "q8_0" or "q4_0". What `from_blocks` returned comes back as it was, to the number."""
    return (to_q8_0 if item == "q8_0" else to_q4_0)(np.ascontiguousarray(values))


def from_blocks(item: str, blocks: Bytes, out: Floats | None = None) -> Floats:
    """Return rows of blocks [rows, bytes] of the type "q8_0" or "q4_0" as float32 [rows, n], in `out` if given."""
    return dequantize(TensorType.Q8_0 if item == "q8_0" else TensorType.Q4_0, blocks, out)
