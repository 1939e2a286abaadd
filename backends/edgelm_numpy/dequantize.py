"""The weights of ggml's tensor types as float32, bit for bit what ggml itself makes of them.

Knows the layout of every block; knows no file, no matrix product and no threads. Integers are unpacked as bytes and
turned into floats once, so that temporaries stay at `TEMPORARY_BYTES` per weight.
Layouts: `ggml-common.h`; arithmetic: `dequantize_row_*` of `ggml-quants.c` in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UnsupportedModel
from edgelm.files.ggml_types import TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Decoder = Callable[[Bytes, Floats], None]

TEMPORARY_BYTES = 4
"""Bytes per weight that `dequantize` needs at most for a moment, besides its output."""

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_TWO_BITS = np.array([[0], [2], [4], [6]], np.uint8)
_POWERS_OF_3 = np.array([[1], [3], [9], [27], [81]], np.uint8)


def dequantize(kind: TensorType, raw: Bytes, out: Floats | None = None) -> Floats:
    """Return the weights of `raw` (uint8 [rows, bytes of a row]) as float32 [rows, width], in `out` if it is given.

    Raises `UnsupportedModel` for a type that has no decoder (see `TYPES`).
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise UnsupportedModel(f"the numpy backend cannot read {kind.name} weights; use another quantization")
    rows, n_blocks = raw.shape[0], raw.shape[1] // kind.block_bytes
    if out is None:
        out = np.empty((rows, n_blocks * kind.block_size), np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite: that is the file's affair
        decoder(raw.reshape(rows, n_blocks, kind.block_bytes), out.reshape(rows, n_blocks, kind.block_size))
    return out


def _f32(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view(np.float32)


def _f16(blocks: Bytes, out: Floats) -> None:
    out[...] = blocks.view(np.float16)


def _bf16(blocks: Bytes, out: Floats) -> None:
    bits = out.view(np.uint32)
    bits[...] = blocks.view(np.uint16)
    bits <<= 16


def _q1_0(blocks: Bytes, out: Floats) -> None:
    bits = np.unpackbits(blocks[..., 2:], axis=-1, bitorder="little")
    bits <<= 1
    bits -= 1
    _scaled(_signed(bits), _half(blocks, 0), out)


def _q2_0(blocks: Bytes, out: Floats) -> None:
    q = _spread(blocks[..., 2:, None], _TWO_BITS[:, 0], 3)
    q -= 1
    _scaled(_signed(q.reshape(out.shape)), _half(blocks, 0), out)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    low, high = _nibbles(blocks[..., 2:])
    low -= 8
    high -= 8
    out[..., :16], out[..., 16:] = _signed(low), _signed(high)
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    out[..., :16], out[..., 16:] = _nibbles(blocks[..., 4:])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    q = _fifth_bits(blocks[..., 2:6], blocks[..., 6:])
    q -= 16
    _scaled(_signed(q), _half(blocks, 0), out)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    _scaled(_fifth_bits(blocks[..., 4:8], blocks[..., 8:]), _half(blocks, 0), out)
    out += _half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    _scaled(blocks[..., 2:].view(np.int8), _half(blocks, 0), out)


def _q2_k(blocks: Bytes, out: Floats) -> None:
    scales = blocks[..., :16]
    fine = _by_16(out)
    fine[...] = _by_16(_four_planes(blocks[..., 16:80]))
    fine *= (_half(blocks, 80) * (scales & 15))[..., None]
    fine -= (_half(blocks, 82) * (scales >> 4))[..., None]


def _q3_k(blocks: Bytes, out: Floats) -> None:
    # The high bit of weight 32 g + l is bit g of hmask[l]; where it is missing, 4 is taken off.
    q = _four_planes(blocks[..., 32:96])
    high = _spread(blocks[..., None, :32], np.arange(8, dtype=np.uint8)[:, None], 1)
    high <<= 2
    q |= high.reshape(q.shape)
    q -= 4
    packed = blocks[..., 96:108]
    scales = np.empty((*blocks.shape[:2], 16), np.uint8)
    scales[..., :8], scales[..., 8:] = _nibbles(packed[..., :8])
    high = _spread(packed[..., None, 8:], _TWO_BITS, 3)
    high <<= 4
    scales |= high.reshape(scales.shape)
    scales -= 32
    _scaled(_by_16(_signed(q)), (_half(blocks, 108) * _signed(scales))[..., None], _by_16(out))


def _q4_k(blocks: Bytes, out: Floats) -> None:
    low, high = _nibbles(blocks[..., 16:])
    chunks = out.reshape(*out.shape[:2], 4, 2, 32)
    chunks[..., 0, :], chunks[..., 1, :] = _by(low, 32), _by(high, 32)
    _scale_and_minimum(blocks, out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    q = np.empty((*blocks.shape[:2], 4, 2, 32), np.uint8)
    low, high = _nibbles(blocks[..., 48:])
    q[..., 0, :], q[..., 1, :] = _by(low, 32), _by(high, 32)
    fifth = _spread(blocks[..., None, 16:48], np.arange(8, dtype=np.uint8)[:, None], 1)
    fifth <<= 4
    q |= fifth.reshape(q.shape)
    out[...] = q.reshape(out.shape)
    _scale_and_minimum(blocks, out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    # Of 128 weights, 0…63 are the low and 64…127 the high halves of 64 bytes; two more bits come from 32 bytes.
    low, high = _nibbles(blocks[..., :128])
    q = np.empty((*blocks.shape[:2], 2, 2, 64), np.uint8)
    q[..., 0, :], q[..., 1, :] = _by(low, 64), _by(high, 64)
    top = _four_planes(blocks[..., 128:192])
    top <<= 4
    q |= top.reshape(q.shape)
    q -= 32
    scales = _half(blocks, 208) * blocks[..., 192:208].view(np.int8)
    _scaled(_by_16(_signed(q.reshape(out.shape))), scales[..., None], _by_16(out))


def _iq4_nl(blocks: Bytes, out: Floats) -> None:
    _lookup(blocks[..., 2:], _IQ4, out)
    out *= _half(blocks, 0)


def _iq4_xs(blocks: Bytes, out: Floats) -> None:
    _lookup(blocks[..., 8:], _IQ4, out)
    scales = np.empty((*blocks.shape[:2], 4, 2), np.uint8)
    scales[..., 0], scales[..., 1] = _nibbles(blocks[..., 4:8])
    high = _spread(blocks[..., 2:4, None], _TWO_BITS[:, 0], 3)
    high <<= 4
    scales |= high.reshape(scales.shape)
    scales -= 32
    fine = _by(out, 32)
    fine *= (_half(blocks, 0) * _signed(scales.reshape(*blocks.shape[:2], 8)))[..., None]


def _tq1_0(blocks: Bytes, out: Floats) -> None:
    # Five ternary digits to a byte, as a fraction of 256: times 3^n modulo 256 brings digit n to the front.
    at = 0
    for start, stop, n_digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        digits = blocks[..., None, start:stop] * _POWERS_OF_3[:n_digits]
        wide = digits.reshape(*blocks.shape[:2], -1) * np.uint16(3)
        wide >>= 8
        out[..., at : at + wide.shape[-1]] = wide
        at += wide.shape[-1]
    out -= 1
    out *= _half(blocks, 52)


def _tq2_0(blocks: Bytes, out: Floats) -> None:
    q = _four_planes(blocks[..., :64])
    q -= 1
    _scaled(_signed(q), _half(blocks, 64), out)


def _mxfp4(blocks: Bytes, out: Floats) -> None:
    # The scale is 2^(e - 128); e < 2 gives the two subnormal numbers below 2^-126.
    exponent = blocks[..., :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
    _lookup(blocks[..., 1:], _FP4, out)
    out *= bits.view(np.float32)


def _nvfp4(blocks: Bytes, out: Floats) -> None:
    # Scales are unsigned E4M3 numbers, halved because the table holds doubled values; 0x7f stands for 0.
    code = blocks[..., :4]
    exponent, fraction = ((code >> 3) & 15).astype(np.int32), (code & 7).astype(np.float32)
    scales = np.where(exponent == 0, np.ldexp(fraction, -10), np.ldexp(1 + fraction / 8, exponent - 8))
    scales[code == 0x7F] = 0
    low, high = _nibbles(blocks[..., 4:])
    fine = out.reshape(*out.shape[:2], 4, 2, 8)
    fine[..., 0, :], fine[..., 1, :] = _by(_mapped(low, _FP4), 8), _by(_mapped(high, _FP4), 8)
    fine *= scales.astype(np.float32)[..., None, None]


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block: float32 [rows, blocks, 1]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Low and high halves of every byte, as two fresh arrays."""
    high = np.array(packed, order="C")
    low = high & np.uint8(15)
    high >>= 4
    return low, high


def _spread(packed: Bytes, shifts: Bytes, mask: int) -> Bytes:
    q = packed >> shifts
    q &= mask
    return q


def _four_planes(packed: Bytes) -> Bytes:
    """Two-bit numbers, [rows, blocks, 64] -> [rows, blocks, 256]: weight 32 g + l is in bits 2g of byte l of a half."""
    return _spread(_by(packed, 32)[..., None, :], _TWO_BITS, 3).reshape(*packed.shape[:2], 256)


def _fifth_bits(bits: Bytes, packed: Bytes) -> Bytes:
    q = np.unpackbits(bits, axis=-1, bitorder="little")
    q <<= 4
    low, high = _nibbles(packed)
    q[..., :16] |= low
    q[..., 16:] |= high
    return q


def _scale_and_minimum(blocks: Bytes, out: Floats) -> None:
    """Finish Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima are packed into 12 bytes."""
    a, b, c = (blocks[..., start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate((a & 63, (c & 15) | (a >> 6 << 4)), axis=-1)
    minima = np.concatenate((b & 63, (c >> 4) | (b >> 6 << 4)), axis=-1)
    fine = _by(out, 32)
    fine *= (_half(blocks, 0) * scales)[..., None]
    fine -= (_half(blocks, 2) * minima)[..., None]


def _lookup(packed: Bytes, table: tuple[int, ...], out: Floats) -> None:
    """Sixteen bytes give 32 weights: first those of the low halves."""
    low, high = _nibbles(packed)
    pairs = out.reshape(*out.shape[:2], -1, 2, 16)
    pairs[..., 0, :], pairs[..., 1, :] = _by(_mapped(low, table), 16), _by(_mapped(high, table), 16)


def _mapped(codes: Bytes, table: tuple[int, ...]) -> NDArray[np.int8]:
    # bytes.translate, not table[codes]: NumPy would widen every index to eight bytes first.
    translation = np.resize(np.array(table, np.int8), 256).tobytes()
    return np.frombuffer(codes.tobytes().translate(translation), np.int8).reshape(codes.shape)


def _signed(q: Bytes) -> NDArray[np.int8]:
    return q.view(np.int8)


def _scaled(q: NDArray[Any], scale: Floats, out: Floats) -> None:
    out[...] = q
    out *= scale


def _by(array: NDArray[Any], n: int) -> NDArray[Any]:
    """Split the last axis into groups of `n`."""
    return array.reshape(*array.shape[:2], -1, n)


def _by_16(array: NDArray[Any]) -> NDArray[Any]:
    return _by(array, 16)


_DECODERS: dict[TensorType, Decoder] = {
    TensorType.F32: _f32,
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
    TensorType.Q1_0: _q1_0,
    TensorType.Q2_0: _q2_0,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
    TensorType.IQ4_NL: _iq4_nl,
    TensorType.IQ4_XS: _iq4_xs,
    TensorType.TQ1_0: _tq1_0,
    TensorType.TQ2_0: _tq2_0,
    TensorType.MXFP4: _mxfp4,
    TensorType.NVFP4: _nvfp4,
}

TYPES = frozenset(_DECODERS)
"""The tensor types that `dequantize` reads."""
