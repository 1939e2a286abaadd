"""How matrices lie for ONNX Runtime: tiles of rows, each packed for a `MatMulNBits` of its own, and exact.

Every quantized type of ggml is codes of at most eight bits, with a float scale and a float minimum for 16 weights or
more. The operator takes minima only as whole multiples of the scale. When it has packed a matrix, though, it keeps one
float for each block that the sum of the block's activations is multiplied by; the minimum itself is written there. That
these floats are where this expects them is proved by `edgelm_onnx.proof` before anything is packed.

Rows that are left over when a matrix is cut in sixteens stay as they are in the file, and so do matrices of floats:
those are in the layout only for where they may be cut, since the order of summation depends on the rows of a product.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from edgelm.engine.backend import Packed
from edgelm.files.blocks import QUANTIZED, TYPES, take_apart
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.model import TensorInfo
from edgelm_onnx.kernels import Floats, Form, constants, products, read_packed
from edgelm_onnx.memory import Bytes
from edgelm_onnx.runtime import version

VERSION = 1
ROW_GROUP = 16
"""Rows whose floats lie together in the packed bytes."""
TILE_BYTES = 2 << 20
_TILE_STEP = 32

_LEAST = {
    TensorType.Q1_0: -1,
    TensorType.Q2_0: -1,
    TensorType.Q4_0: -8,
    TensorType.Q5_0: -16,
    TensorType.Q8_0: -128,
    TensorType.Q3_K: -4,
    TensorType.Q6_K: -32,
    TensorType.IQ4_NL: -127,
    TensorType.IQ4_XS: -127,
    TensorType.TQ1_0: -1,
    TensorType.TQ2_0: -1,
    TensorType.MXFP4: -12,
    TensorType.NVFP4: -12,
}
"""The least code that `take_apart` gives, where it is not 0."""
_FOUR_BITS = frozenset(
    TensorType[name] for name in ("Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "TQ1_0", "TQ2_0")
)
_BLOCKS_OF_16 = frozenset(TensorType[name] for name in ("Q2_K", "Q3_K", "Q6_K", "NVFP4"))


class Tile(NamedTuple):
    """Rows that are one product: packed, or (`form` None) as in the file."""

    first_row: int
    rows: int
    form: Form | None


def form_of(kind: TensorType, width: int, rows: int) -> Form:
    small = kind in _FOUR_BITS if kind.affine is None else kind.affine.bits <= 4
    return Form(rows, width, 4 if small else 8, 16 if kind in _BLOCKS_OF_16 else 32)


def is_packed(kind: TensorType) -> bool:
    return kind in QUANTIZED


def stored_row_bytes(kind: TensorType, width: int) -> int:
    """Return the bytes of a row in the layout."""
    if not is_packed(kind):
        return row_bytes(kind, width)
    form = form_of(kind, width, 1)
    return form.code_bytes + form.n_blocks * floats_bytes(form.bits, form.block)


def working_row_bytes(kind: TensorType, width: int) -> int:
    """Return the bytes of a row when it is computed with: floats are widened."""
    return stored_row_bytes(kind, width) if is_packed(kind) else 4 * width


def tile_rows(kind: TensorType, width: int) -> int:
    return max(TILE_BYTES // working_row_bytes(kind, width) // _TILE_STEP, 1) * _TILE_STEP


def tiles(kind: TensorType, width: int, rows: int) -> list[Tile]:
    """Return how some rows of a matrix that begin at a tile's first are cut."""
    packed = is_packed(kind)
    step, whole = tile_rows(kind, width), rows // ROW_GROUP * ROW_GROUP if packed else rows
    cut = [Tile(first, min(step, whole - first), None) for first in range(0, whole, step)]
    if packed:
        cut = [tile._replace(form=form_of(kind, width, tile.rows)) for tile in cut]
    return [*cut, Tile(whole, rows - whole, None)] if whole < rows else cut


@cache
def floats_bytes(bits: int, block: int) -> int:
    """Return the bytes of all floats that a packed block has. Packs a small matrix to see."""
    form = Form(ROW_GROUP, 2 * block, bits, block)
    scales = np.arange(1, form.rows * form.n_blocks + 1, dtype=np.float32)
    packed = packed_codes(form, np.zeros((form.rows, form.width), np.uint8), scales)
    return (len(packed) - form.code_bytes) // (form.rows * form.n_blocks)


def packed_codes(form: Form, codes: Bytes, scales: Floats) -> Bytes:
    """Let ONNX Runtime pack codes [rows, width] and scales [rows, blocks]; return its bytes.

    Raises `BackendUnavailable` if they are not found.
    """
    if form.bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    given = {
        stand.name: np.ascontiguousarray(array).reshape(stand.shape)
        for stand, array in zip(constants("m0", form), (codes, scales), strict=True)
    }
    graph = products([form], given)
    packed = read_packed(form, scales)
    del graph
    return packed


def pack_rows(form: Form, kind: TensorType, raw: Bytes) -> Bytes:
    """Return the packed bytes of rows of ggml's type `kind`: uint8 [rows, bytes of a row]."""
    parts = take_apart(kind, raw)
    least = _LEAST.get(kind, 0)
    codes = (parts.codes.reshape(form.rows, form.width) - np.int16(least)).astype(np.uint8)
    groups = parts.scales.reshape(form.rows, -1)
    with np.errstate(invalid="ignore", over="ignore"):  # a scale may be infinite: that is the file's affair
        minima = groups * np.float32(least)
        if parts.offsets is not None:
            minima += parts.offsets.reshape(groups.shape)
    each = form.n_blocks // groups.shape[1]
    scales, minima = (np.repeat(numbers, each, axis=1) for numbers in (groups, minima))
    packed = packed_codes(form, codes, scales)
    put_minima(form, packed, minima)
    return packed


def put_minima(form: Form, packed: Bytes, minima: Floats) -> None:
    """Write the minima [rows, blocks] where ONNX Runtime has put `-scale * zero point`."""
    target = packed[form.code_bytes :][: minima.nbytes].view(np.float32)
    by_group = minima.reshape(-1, ROW_GROUP, form.n_blocks).transpose(0, 2, 1)
    target.reshape(by_group.shape)[...] = by_group


class OnnxLayout:
    """See `edgelm.engine.backend.WeightLayout`. Exact for every quantized type that edgelm reads."""

    @property
    def key(self) -> str:
        return f"onnxruntime {version()}, layout {VERSION}, tiles of {TILE_BYTES}"

    def packed(self, info: TensorInfo) -> Packed | None:
        if info.type not in TYPES:
            return None
        width = info.shape[0]
        return Packed(stored_row_bytes(info.type, width), tile_rows(info.type, width))

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        width, target = info.shape[0], np.frombuffer(out, np.uint8)
        raw = np.frombuffer(rows, np.uint8).reshape(-1, row_bytes(info.type, width))
        for tile in tiles(info.type, width, len(raw)):
            part = raw[tile.first_row : tile.first_row + tile.rows]
            packed = part.reshape(-1) if tile.form is None else pack_rows(tile.form, info.type, part)
            at = tile.first_row * stored_row_bytes(info.type, width)
            target[at : at + len(packed)] = packed
