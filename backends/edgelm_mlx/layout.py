"""Convert ggml's quantized matrices into MLX's affine form, once: every type of `FORMS` exactly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Packed
from edgelm.errors import UnsupportedModel
from edgelm.files.blocks import Floats, Parts, take_apart
from edgelm.files.ggml_types import row_bytes
from edgelm.files.model import ROW_STEP, TensorInfo
from edgelm_mlx.forms import FORMS, GROUP, HALF, Form, held_row_bytes, runs


class MlxLayout:
    """See `edgelm.engine.backend.WeightLayout`. The bytes depend on no library and no processor."""

    key = "mlx-affine-1"

    def packed(self, info: TensorInfo) -> Packed | None:
        if info.type not in FORMS or info.type.affine is not None or info.n_rows == 1:
            return None
        return Packed(held_row_bytes(info.type, info.shape[0]), ROW_STEP)

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        """Convert a tile. Raises `UnsupportedModel` for scales beyond float16, which no sane file has."""
        kind, width = info.type, info.shape[0]
        parts = take_apart(kind, np.frombuffer(rows, np.uint8).reshape(-1, row_bytes(kind, width)))
        numbers = _numbers(parts, FORMS[kind], width)
        if np.isfinite(parts.scales).all() and not all(np.isfinite(held).all() for held in numbers[1:]):
            raise UnsupportedModel(f"tensor {info.name!r} has scales too large for MLX; use another backend")
        n = len(parts.codes)
        target = np.frombuffer(out, np.uint8)[: n * held_row_bytes(kind, width)].reshape(n, -1)
        for run, held in zip(runs(kind, width), numbers, strict=True):
            target[:, run.at : run.stop] = held.view(np.uint8)


def _numbers(parts: Parts, form: Form, width: int) -> list[NDArray[np.generic]]:
    """Return what the runs of the rows hold, each [rows, items] or, for the words, as bytes."""
    n = len(parts.codes)
    quants = parts.codes.reshape(n, width).view(np.uint8) + np.uint8(form.zero)
    biases = parts.scales * np.float32(-form.zero)
    if parts.offsets is not None:
        biases += parts.offsets
    dtype = np.dtype(f"<f{form.scales.block_bytes}")
    numbers: list[NDArray[np.generic]] = [pack_bits(quants, form.bits)]
    by_group = [_by_group(part.reshape(n, -1), width, form) for part in (parts.scales, biases)]
    with np.errstate(over="ignore"):
        for pair in zip(*by_group, strict=True):
            numbers.extend(part.astype(dtype) for part in pair)
    return numbers


def _by_group(numbers: Floats, width: int, form: Form) -> list[Floats]:
    """Return [rows, groups] for every group of 32: what its numbers share, and what changes sign half-way."""
    if not form.halves:
        return [np.repeat(numbers, width // GROUP // numbers.shape[1], axis=1)]
    halves = np.repeat(numbers, width // HALF // numbers.shape[1], axis=1)
    first, second = halves[:, 0::2], halves[:, 1::2]
    return [(first + second) * np.float32(0.5), (first - second) * np.float32(0.5)]


def pack_bits(quants: NDArray[np.uint8], n_bits: int) -> NDArray[np.uint8]:
    """Return [rows, width * n_bits / 8] for quants [rows, width]: a stream of bits, the lowest first."""
    eights = quants.reshape(len(quants), -1, 8)
    packed = np.zeros(eights.shape[:2], "<u8")
    for i in range(8):
        packed |= eights[..., i].astype("<u8") << np.uint64(n_bits * i)
    return np.ascontiguousarray(packed[..., None].view(np.uint8)[..., :n_bits]).reshape(len(quants), -1)
