"""Rows of MLX's affine quantization: put together of their three arrays, taken apart, and as rows of ggml's types.

Pure functions on arrays of bytes; reads nothing. Source of the bit order: `mlx/backend/cpu/quantized.cpp`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.files.ggml_types import Affine, TensorType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

_FEW_BITS = 4
"""Up to so many bits, a quant fits into Q4_1; with one more, into Q5_1."""


def holder(form: Affine) -> tuple[TensorType, str]:
    """Return the ggml type for weights of this form, and what the conversion loses, "" if nothing.

    A group is two or more blocks of Q4_1 or Q5_1 with the same scale and minimum. No type of ggml has six or eight
    bits and a minimum, so these become float16.
    """
    if form.bits > _FEW_BITS + 1:
        return TensorType.F16, f"{form.bits}-bit weights are held as float16: each is rounded by up to 0.05 %"
    kind = TensorType.Q4_1 if form.bits <= _FEW_BITS else TensorType.Q5_1
    if form.scales is TensorType.F16:
        return kind, ""
    if form.scales is TensorType.BF16:
        return kind, "bfloat16 scales below 2^-17 are rounded to float16, by up to 2^-25; larger ones are exact"
    return kind, "float32 scales are rounded to float16, by up to 0.05 %"


def unpack(words: Bytes, bits: int) -> Bytes:
    """Return the quants, uint8 [rows, n], of the bytes of little-endian words: uint8 [rows, n * bits / 8]."""
    if bits == 8:
        return words
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        return (words[..., None] >> shifts & np.uint8((1 << bits) - 1)).reshape(len(words), -1)
    period = words.view("<u4").reshape(len(words), -1, bits)  # 32 weights fill `bits` words
    quants = np.empty((*period.shape[:2], 32), np.uint8)
    for at in range(32):
        word, shift = divmod(at * bits, 32)
        found = period[..., word] >> np.uint32(shift)
        if shift + bits > 32:
            found |= period[..., word + 1] << np.uint32(32 - shift)
        quants[..., at] = found & np.uint32((1 << bits) - 1)
    return quants.reshape(len(words), -1)


def widen(kind: TensorType, raw: Bytes) -> Floats:
    """Return F16, BF16 or F32 numbers, given as bytes [rows, n bytes], as float32 [rows, n]."""
    if kind is TensorType.BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({TensorType.F16: "<f2", TensorType.F32: "<f4"}[kind]).astype(np.float32)


def split_rows(form: Affine, rows: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Return quants uint8 [rows, groups, group], scales and biases float32 [rows, groups] of rows of an affine type."""
    n = rows.shape[1] // form.type.block_bytes * form.group
    n_words, n_scales, _ = form.runs(n)
    words, scales, biases = np.split(rows, (n_words, n_words + n_scales), axis=1)
    quants = unpack(np.ascontiguousarray(words), form.bits).reshape(len(rows), -1, form.group)
    scales, biases = (np.ascontiguousarray(part) for part in (scales, biases))
    return quants, widen(form.scales, scales), widen(form.scales, biases)


def as_ggml(form: Affine, rows: Bytes) -> Bytes:
    """Return rows of an affine type as rows of the ggml type that `holder` names.

    Raises `OverflowError` if a number is too large for float16.
    """
    quants, scales, biases = split_rows(form, rows)
    kind, _ = holder(form)
    if kind is TensorType.F16:
        weights = quants * scales[..., None] + biases[..., None]
        return _half(weights.reshape(len(rows), -1)).view(np.uint8)
    per_block = form.group // kind.block_size
    blocks = quants.reshape(len(rows), -1, kind.block_size)
    out = np.empty((len(rows), blocks.shape[1], kind.block_bytes), np.uint8)
    for at, numbers in ((0, scales), (2, biases)):
        out[..., at : at + 2] = _half(np.repeat(numbers, per_block, axis=1))[..., None].view(np.uint8)
    low = blocks & 15
    out[..., -16:] = low[..., :16] | low[..., 16:] << 4
    if kind is TensorType.Q5_1:
        out[..., 4:8] = np.packbits(blocks >> 4, axis=2, bitorder="little")
    return out.reshape(len(rows), -1)


def _half(numbers: Floats) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        halves = numbers.astype("<f2")
    if not np.isfinite(halves).all():
        raise OverflowError("a number is too large for float16")
    return halves
