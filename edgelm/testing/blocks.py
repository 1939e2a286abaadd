"""Random weights in every ggml type that models use, with a wanted spread, without any quantizer.

The quants of a block are random bits; only the scales are chosen, so that every block is valid and its weights have a
mean near zero. Knows where the scales of a block lie, not how to read a block.
Source of the layouts: `ggml-common.h` of llama.cpp.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.files.ggml_types import TensorType


class _Scales(NamedTuple):
    """`spread`: the standard deviation of the weights when the scale d is 1. `minimum`: the second scale over d."""

    spread: float
    d_at: int
    minimum_at: int | None = None
    minimum: float = 0.0


_HALF_SCALES: dict[TensorType, _Scales] = {
    TensorType.Q4_0: _Scales(4.6, 0),
    TensorType.Q4_1: _Scales(4.6, 0, 2, -7.5),
    TensorType.Q5_0: _Scales(9.2, 0),
    TensorType.Q5_1: _Scales(9.2, 0, 2, -15.5),
    TensorType.Q8_0: _Scales(74.0, 0),
    TensorType.Q2_K: _Scales(14.0, 80, 82, 1.5),
    TensorType.Q3_K: _Scales(42.0, 108),
    TensorType.Q4_K: _Scales(260.0, 0, 2, 7.5),
    TensorType.Q5_K: _Scales(540.0, 0, 2, 15.5),
    TensorType.Q6_K: _Scales(1370.0, 208),
    TensorType.IQ4_NL: _Scales(68.0, 0),
    TensorType.IQ4_XS: _Scales(1250.0, 0),
    TensorType.IQ2_XXS: _Scales(54.0, 0),
    TensorType.IQ2_XS: _Scales(56.0, 0),
    TensorType.IQ2_S: _Scales(57.0, 0),
    TensorType.IQ3_XXS: _Scales(143.0, 0),
    TensorType.IQ3_S: _Scales(143.0, 0),
    TensorType.IQ1_S: _Scales(7.0, 0),
    TensorType.TQ1_0: _Scales(0.82, 52),
    TensorType.TQ2_0: _Scales(0.72, 64),
}
_MXFP4_SPREAD = 6.1  # of the sixteen values in units of half the block's power of two

RANDOM_TYPES = frozenset({TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.MXFP4, *_HALF_SCALES})
"""The types that `random_weights` makes."""


def random_weights(kind: TensorType, n: int, spread: float, rng: np.random.Generator) -> bytes:
    """Return `n` random weights of type `kind` with a standard deviation near `spread` and a mean near zero."""
    if kind in (TensorType.F32, TensorType.F16, TensorType.BF16):
        return encode_floats(kind, rng.standard_normal(n, dtype=np.float32) * np.float32(spread))
    assert kind in RANDOM_TYPES, f"no random blocks of type {kind.name}"
    n_blocks, rest = divmod(n, kind.block_size)
    assert rest == 0, f"{n} weights are not a whole number of {kind.name} blocks"
    blocks = rng.integers(0, 256, (n_blocks, kind.block_bytes), dtype=np.uint8)
    if kind is TensorType.MXFP4:
        exponent = math.log2(2 * spread / _MXFP4_SPREAD)  # rounded up and down so that the mean is right
        blocks[:, 0] = 127 + np.floor(exponent + rng.random(n_blocks))
        return blocks.tobytes()
    if kind is TensorType.TQ1_0:
        _set_trits(blocks, rng)
    if kind is TensorType.TQ2_0:
        blocks[:, :64] &= ~((blocks[:, :64] & 0x55) << 1 & blocks[:, :64])  # the quant 3 becomes 1: it is never written
    scales = _HALF_SCALES[kind]
    d = (spread / scales.spread * rng.uniform(0.8, 1.2, n_blocks)).astype(np.float16)
    _put_half(blocks, scales.d_at, d)
    if scales.minimum_at is not None:
        _put_half(blocks, scales.minimum_at, (d.astype(np.float32) * scales.minimum).astype(np.float16))
    return blocks.tobytes()


def encode_floats(kind: TensorType, values: NDArray[np.float32]) -> bytes:
    """Return `values` as F32, F16 or BF16 (rounded to nearest even)."""
    if kind is TensorType.F32:
        return values.astype("<f4").tobytes()
    if kind is TensorType.F16:
        return values.astype("<f2").tobytes()
    bits = values.astype("<f4").view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")
    return rounded.tobytes()


def _put_half(blocks: NDArray[np.uint8], at: int, values: NDArray[np.float16]) -> None:
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _set_trits(blocks: NDArray[np.uint8], rng: np.random.Generator) -> None:
    """Fill TQ1_0 quants as its quantizer does: five trits, or four and a zero, as a fraction of 243 in 256ths."""
    five: NDArray[Any] = rng.integers(0, 243, (len(blocks), 48))
    four: NDArray[Any] = rng.integers(0, 81, (len(blocks), 4)) * 3
    blocks[:, :48] = (five * 256 + 242) // 243
    blocks[:, 48:52] = (four * 256 + 242) // 243
