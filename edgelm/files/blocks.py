"""The weights of ggml's tensor types as float32, bit for bit what ggml itself makes of them.

Knows the layout of every block; knows no file, no matrix product and no threads. A quantized block is first taken
apart into small integers, scales and offsets; temporaries stay at `TEMPORARY_BYTES` per weight.
Layouts: `ggml-common.h`; arithmetic: `dequantize_row_*` of `ggml-quants.c` in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import UnsupportedModel
from edgelm.files.affine import split_rows
from edgelm.files.ggml_types import AFFINE_TYPES, TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

TEMPORARY_BYTES = 4
"""Bytes per weight that `dequantize` needs at most for a moment, besides its output."""

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_POWERS_OF_3 = np.array([[1], [3], [9], [27], [81]], np.uint8)


@dataclass(frozen=True, slots=True)
class Parts:
    """Quantized weights taken apart: weight = code * scale + offset, with one scale and offset for each group.

    `codes` are 8-bit integers [rows, blocks, weights of a block]; `scales` and `offsets` are float32
    [rows, blocks, groups of a block]. Without `offsets` they are zero.
    """

    codes: NDArray[Any]
    scales: Floats
    offsets: Floats | None = None


def dequantize(kind: TensorType, raw: Bytes, out: Floats | None = None) -> Floats:
    """Return the weights of `raw` (uint8 [rows, bytes of a row]) as float32 [rows, width], in `out` if it is given.

    Raises `UnsupportedModel` for a type that has no decoder (see `TYPES`).
    """
    if out is None:
        out = np.empty((raw.shape[0], raw.shape[1] // kind.block_bytes * kind.block_size), np.float32)
    if kind not in QUANTIZED:
        _widen(kind, raw, out)
        return out
    parts = take_apart(kind, raw)
    out.reshape(parts.codes.shape)[...] = parts.codes
    groups = out.reshape(*parts.scales.shape, -1)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite: that is the file's affair
        groups *= parts.scales[..., None]
        if parts.offsets is not None:
            groups += parts.offsets[..., None]
    return out


def take_apart(kind: TensorType, raw: Bytes) -> Parts:
    """Return the integers and scales of quantized weights, `raw` being uint8 [rows, bytes of a row]."""
    if kind.affine is not None:
        quants, group_scales, biases = split_rows(kind.affine, raw)
        return Parts(quants, group_scales[..., None], biases[..., None])
    with np.errstate(invalid="ignore", over="ignore"):
        return _QUANTIZED[kind](raw.reshape(len(raw), -1, kind.block_bytes))


def _widen(kind: TensorType, raw: Bytes, out: Floats) -> None:
    if kind is TensorType.F32:
        out[...] = raw.view(np.float32)
    elif kind is TensorType.F16:
        out[...] = raw.view(np.float16)
    elif kind is TensorType.BF16:
        bits = out.view(np.uint32)
        bits[...] = raw.view(np.uint16)
        bits <<= 16
    else:
        raise UnsupportedModel(f"edgelm has no decoder for {kind.name} weights; use another quantization")


def _q1_0(blocks: Bytes) -> Parts:
    q = _planes(_cut(blocks, 2, 18), 1, 1)
    q <<= 1
    return Parts(_signed(q, 1), _half(blocks, 0))


def _q2_0(blocks: Bytes) -> Parts:
    return Parts(_signed(_planes(_cut(blocks, 2, 18), 1, 2), 1), _half(blocks, 0))


def _q4_0(blocks: Bytes) -> Parts:
    return Parts(_signed(_planes(_cut(blocks, 2, 18), 16, 4), 8), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Parts:
    return Parts(_planes(_cut(blocks, 4, 20), 16, 4), _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: Bytes) -> Parts:
    return Parts(_signed(_five_bits(blocks, 2), 16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Parts:
    return Parts(_five_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Parts:
    return Parts(_cut(blocks, 2, 34).view(np.int8), _half(blocks, 0))


def _q2_k(blocks: Bytes) -> Parts:
    scales = blocks[..., :16]
    codes = _planes(_cut(blocks, 16, 80), 32, 2)
    return Parts(codes, _half(blocks, 80) * (scales & 15), -_half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Bytes) -> Parts:
    # The third bit of weight 32 g + l is bit g of byte l of the mask; a 0 there takes 4 off.
    q = _planes(_cut(blocks, 32, 96), 32, 2)
    top = _planes(_cut(blocks, 0, 32), 32, 1)
    top <<= 2
    q |= top
    scales = _planes(_cut(blocks, 96, 104), 8, 4)
    top = _planes(_cut(blocks, 104, 108), 4, 2)
    top <<= 4
    scales |= top
    return Parts(_signed(q, 4), _half(blocks, 108) * _signed(scales, 32))


def _q4_k(blocks: Bytes) -> Parts:
    return Parts(_planes(_cut(blocks, 16, 144), 32, 4), *_scales_and_offsets(blocks))


def _q5_k(blocks: Bytes) -> Parts:
    q = _planes(_cut(blocks, 48, 176), 32, 4)
    top = _planes(_cut(blocks, 16, 48), 32, 1)
    top <<= 4
    q |= top
    return Parts(q, *_scales_and_offsets(blocks))


def _q6_k(blocks: Bytes) -> Parts:
    q = _planes(_cut(blocks, 0, 128), 64, 4)
    top = _planes(_cut(blocks, 128, 192), 32, 2)
    top <<= 4
    q |= top
    return Parts(_signed(q, 32), _half(blocks, 208) * blocks[..., 192:208].view(np.int8))


def _iq4_nl(blocks: Bytes) -> Parts:
    return Parts(_looked_up(_planes(_cut(blocks, 2, 18), 16, 4), _IQ4), _half(blocks, 0))


def _iq4_xs(blocks: Bytes) -> Parts:
    scales = _planes(_cut(blocks, 4, 8), 1, 4)
    top = _planes(_cut(blocks, 2, 4), 1, 2)
    top <<= 4
    scales |= top
    codes = _looked_up(_planes(_cut(blocks, 8, 136), 16, 4), _IQ4)
    return Parts(codes, _half(blocks, 0) * _signed(scales, 32))


def _tq1_0(blocks: Bytes) -> Parts:
    # Five ternary digits to a byte, as a fraction of 256: times 3^n modulo 256 brings digit n to the front.
    codes = np.empty((*blocks.shape[:2], 256), np.uint8)
    at = 0
    for start, stop, n_digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        digits = blocks[..., None, start:stop] * _POWERS_OF_3[:n_digits]
        wide = digits.reshape(*blocks.shape[:2], -1) * np.uint16(3)
        wide >>= 8
        codes[..., at : at + wide.shape[-1]] = wide
        at += wide.shape[-1]
    return Parts(_signed(codes, 1), _half(blocks, 52))


def _tq2_0(blocks: Bytes) -> Parts:
    return Parts(_signed(_planes(_cut(blocks, 0, 64), 32, 2), 1), _half(blocks, 64))


def _mxfp4(blocks: Bytes) -> Parts:
    # The scale is 2^(e - 128); e < 2 gives the two subnormal numbers below 2^-126.
    exponent = blocks[..., :1].astype(np.uint32)
    bits = np.where(exponent < 2, np.uint32(0x00200000) << exponent, (exponent - np.uint32(1)) << np.uint32(23))
    return Parts(_looked_up(_planes(_cut(blocks, 1, 17), 16, 4), _FP4), bits.view(np.float32))


def _nvfp4(blocks: Bytes) -> Parts:
    # Scales are unsigned E4M3 numbers, halved because the table holds doubled values; 0x7f stands for 0.
    code = blocks[..., :4]
    exponent, fraction = ((code >> 3) & 15).astype(np.int32), (code & 7).astype(np.float32)
    scales = np.where(exponent == 0, np.ldexp(fraction, -10), np.ldexp(1 + fraction / 8, exponent - 8))
    scales[code == 0x7F] = 0
    return Parts(_looked_up(_planes(_cut(blocks, 4, 36), 8, 4), _FP4), scales.astype(np.float32))


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte `at` of every block: float32 [rows, blocks, 1]."""
    return blocks[..., at : at + 2].view(np.float16).astype(np.float32)


def _cut(blocks: Bytes, start: int, stop: int) -> Bytes:
    """Bytes `start` … `stop - 1` of every block, side by side: a fresh array."""
    # As one element to a block: copied byte by byte, NumPy takes eight times as long.
    return blocks[..., start:stop].view(f"V{stop - start}").copy().view(np.uint8)


def _planes(packed: Bytes, width: int, n_bits: int) -> Bytes:
    """Take numbers of `n_bits` out of bytes: first the lowest bits of `width` bytes, then their next ones, and so on.

    `packed` is [rows, blocks, n], the result [rows, blocks, n * 8 / n_bits].
    """
    rows, n_blocks, n = packed.shape
    n_planes, element = 8 // n_bits, f"V{width}"
    planes = np.empty((rows, n_blocks, n // width, n_planes), element)
    for plane in range(n_planes):
        q = packed >> np.uint8(plane * n_bits)
        q &= np.uint8((1 << n_bits) - 1)
        planes[..., plane] = q.view(element)
    return planes.view(np.uint8).reshape(rows, n_blocks, n * n_planes)


def _five_bits(blocks: Bytes, at: int) -> Bytes:
    """The quants of Q5_0 and Q5_1: 32 fifth bits, then 32 nibbles."""
    q = _planes(_cut(blocks, at + 4, at + 20), 16, 4)
    top = np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little")
    top <<= 4
    q |= top
    return q


def _scales_and_offsets(blocks: Bytes) -> tuple[Floats, Floats]:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima are packed into 12 bytes."""
    # Four at a time as one word, so that NumPy's loops are long; bytes keep their order whatever the machine's is.
    words = _cut(blocks, 4, 16).view(np.uint32)
    a, b, c = words[..., 0], words[..., 1], words[..., 2]
    six, four, two = np.uint32(0x3F3F3F3F), np.uint32(0x0F0F0F0F), np.uint32(0x03030303)
    scales = np.stack((a & six, c & four | (a >> 6 & two) << 4), axis=-1).view(np.uint8)
    minima = np.stack((b & six, c >> 4 & four | (b >> 6 & two) << 4), axis=-1).view(np.uint8)
    return _half(blocks, 0) * scales, -_half(blocks, 2) * minima


def _looked_up(codes: Bytes, table: tuple[int, ...]) -> NDArray[np.int8]:
    # bytes.translate, not table[codes]: NumPy would widen every index to eight bytes first.
    translation = np.resize(np.array(table, np.int8), 256).tobytes()
    return np.frombuffer(codes.tobytes().translate(translation), np.int8).reshape(codes.shape)


def _signed(q: Bytes, zero: int) -> NDArray[np.int8]:
    """The numbers `q - zero`, in place."""
    q -= np.uint8(zero)
    return q.view(np.int8)


_QUANTIZED: dict[TensorType, Callable[[Bytes], Parts]] = {
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

QUANTIZED = AFFINE_TYPES.union(_QUANTIZED)
"""The tensor types that `take_apart` reads."""
TYPES = QUANTIZED | {TensorType.F32, TensorType.F16, TensorType.BF16}
"""The tensor types that `dequantize` reads."""
