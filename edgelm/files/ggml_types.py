"""The tensor types of ggml: id, name, weights per block, bytes per block; and MLX's affine quantization beside them.

Knows how many bytes a row takes; knows nothing about what is inside a block.
Source: `ggml-common.h` and the type table of `ggml.c` in llama.cpp; `mlx.core.quantize` for the affine types.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from edgelm.errors import UnsupportedModel

_FIRST_AFFINE = 0x10000  # GGUF files hold none of these ids
_AFFINE = tuple(
    (bits, group, scales) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128) for scales in ("F16", "BF16", "F32")
)


class TensorType(IntEnum):
    """A ggml tensor type, the value is its id in GGUF files; or an affine one, such as `AFFINE4_G64_BF16`.

    A row of an affine type is three runs: all its quants, packed into little-endian 32-bit words from the lowest bit
    on (`bits` words for 32 weights); the scale of each group; the bias of each group. A weight is `scale * q + bias`.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42

    _ignore_ = "_at _bits _group _scales"
    for _at, (_bits, _group, _scales) in enumerate(_AFFINE):
        vars()[f"AFFINE{_bits}_G{_group}_{_scales}"] = _FIRST_AFFINE + _at

    @property
    def affine(self) -> Affine | None:
        """What the name of an affine type says; None for ggml's own types."""
        if self < _FIRST_AFFINE:
            return None
        bits, group, scales = _AFFINE[self - _FIRST_AFFINE]
        return Affine(bits, group, TensorType[scales])

    @property
    def block_size(self) -> int:
        """Weights per block; a row is a whole number of blocks."""
        return TYPES[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return TYPES[self][1]


TYPES: dict[TensorType, tuple[int, int]] = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q8_1: (32, 36),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.Q8_K: (256, 292),
    TensorType.IQ2_XXS: (256, 66),
    TensorType.IQ2_XS: (256, 74),
    TensorType.IQ3_XXS: (256, 98),
    TensorType.IQ1_S: (256, 50),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ3_S: (256, 110),
    TensorType.IQ2_S: (256, 82),
    TensorType.IQ4_XS: (256, 136),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.F64: (1, 8),
    TensorType.IQ1_M: (256, 56),
    TensorType.BF16: (1, 2),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
    TensorType.Q1_0: (128, 18),
    TensorType.Q2_0: (64, 18),
}
"""Weights per block and bytes per block of every type."""


class Affine(NamedTuple):
    """MLX's affine quantization: `bits` for a weight, and for each `group` of a row a scale and a bias."""

    bits: int
    group: int
    scales: TensorType
    """Of scales and biases: F16, BF16 or F32."""

    @property
    def is_known(self) -> bool:
        """Whether there is a type of rows quantized like this."""
        return (self.bits, self.group, self.scales.name) in _AFFINE

    @property
    def type(self) -> TensorType:
        """The tensor type of rows quantized like this. Raises `KeyError` if there is none."""
        return TensorType[f"AFFINE{self.bits}_G{self.group}_{self.scales.name}"]

    def runs(self, n: int) -> tuple[int, int, int]:
        """Return the bytes of the three runs of a row of `n` weights: words, scales, biases."""
        n_scales = n // self.group * self.scales.block_bytes
        return n * self.bits // 8, n_scales, n_scales


AFFINE_TYPES = frozenset(kind for kind in TensorType if kind.affine is not None)
for _kind in AFFINE_TYPES:
    _form = _kind.affine
    assert _form is not None
    TYPES[_kind] = (_form.group, sum(_form.runs(_form.group)))

REMOVED: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
"""Types that ggml once had; their ids are never given out again."""


def tensor_type(type_id: int) -> TensorType:
    """Return the type with this id.

    Raises `UnsupportedModel` for a removed type and for one that this edgelm does not know.
    """
    if type_id in REMOVED:
        raise UnsupportedModel(
            f"tensor type {REMOVED[type_id]} (id {type_id}) was removed from ggml; "
            "use a file quantized again, such as Q4_0 or Q4_K_M"
        )
    try:
        if type_id >= _FIRST_AFFINE:
            raise ValueError
        return TensorType(type_id)
    except ValueError:
        raise UnsupportedModel(
            f"tensor type id {type_id} is not known to this edgelm; use another quantization or a newer edgelm"
        ) from None


def row_bytes(kind: TensorType, n: int) -> int:
    """Return the bytes of `n` consecutive weights; `n` must be a whole number of blocks."""
    n_blocks, rest = divmod(n, kind.block_size)
    assert rest == 0, f"{n} weights are not a whole number of {kind.name} blocks of {kind.block_size}"
    return n_blocks * kind.block_bytes
