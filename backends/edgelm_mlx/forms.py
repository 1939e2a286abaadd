"""How the numbers of each tensor type are held for MLX: as affine quants of so many bits, or as floats.

A row of affine quants is a few runs: the quants, packed into little-endian 32-bit words from the lowest bit on; the
scale of each group of 32; the bias of each group. Weight = scale * quant + bias.

Some types have a scale for each 16 weights, and MLX has no such groups. Of the two scales s and t in a group of 32,
(s + t) / 2 is a scale for all, and (s - t) / 2 one whose sign changes half-way: so the product with a row x is the sum
of two products of the same quants, with x and with x whose signs are changed in every other half. Both are exact.
"""

from __future__ import annotations

from typing import NamedTuple

from edgelm.files.ggml_types import AFFINE_TYPES, TensorType

GROUP = 32
HALF = GROUP // 2


class Form(NamedTuple):
    """`zero` is the quant that stands for the integer 0. `halves`: a second scale and bias, for the two halves."""

    bits: int
    zero: int
    scales: TensorType
    """Of scales and biases: F16, BF16 or F32."""
    halves: bool = False
    group: int = GROUP


class Run(NamedTuple):
    """A stretch of every row: `items` numbers of type `kind` (None: words of quants), beginning at byte `at`."""

    at: int
    items: int
    kind: TensorType | None

    @property
    def item_bytes(self) -> int:
        return 4 if self.kind is None else self.kind.block_bytes

    @property
    def stop(self) -> int:
        return self.at + self.items * self.item_bytes


_F16, _F32 = TensorType.F16, TensorType.F32
# Scales and minima that are float16 in the file stay float16; a product of two such numbers needs float32.
FORMS: dict[TensorType, Form] = {
    TensorType.Q1_0: Form(2, 1, _F16),
    TensorType.Q2_0: Form(2, 1, _F16),
    TensorType.Q4_0: Form(4, 8, _F16),
    TensorType.Q4_1: Form(4, 0, _F16),
    TensorType.Q5_0: Form(5, 16, _F16),
    TensorType.Q5_1: Form(5, 0, _F16),
    TensorType.Q8_0: Form(8, 128, _F16),
    TensorType.Q2_K: Form(2, 0, _F32, halves=True),
    TensorType.Q3_K: Form(3, 4, _F32, halves=True),
    TensorType.Q4_K: Form(4, 0, _F32),
    TensorType.Q5_K: Form(5, 0, _F32),
    TensorType.Q6_K: Form(6, 32, _F32, halves=True),
    TensorType.IQ4_NL: Form(8, 128, _F16),
    TensorType.IQ4_XS: Form(8, 128, _F32),
    TensorType.TQ1_0: Form(2, 1, _F16),
    TensorType.TQ2_0: Form(2, 1, _F16),
    TensorType.MXFP4: Form(5, 12, _F32),
    TensorType.NVFP4: Form(5, 12, _F32, halves=True),
}
for _kind in AFFINE_TYPES:  # as MLX quantizes itself: the rows of such folders are held as they are
    if (_affine := _kind.affine) is not None:
        FORMS[_kind] = Form(_affine.bits, 0, _affine.scales, group=_affine.group)
FLOATS = frozenset({TensorType.F32, TensorType.F16, TensorType.BF16})
TYPES = frozenset(FORMS) | FLOATS


def runs(kind: TensorType, width: int) -> tuple[Run, ...]:
    """Return the runs of a row of `width` weights."""
    form = FORMS.get(kind)
    if form is None:
        return (Run(0, width, kind),)
    found = [Run(0, width * form.bits // 32, None)]
    for _ in range(4 if form.halves else 2):
        found.append(Run(found[-1].stop, width // form.group, form.scales))
    return tuple(found)


def held_row_bytes(kind: TensorType, width: int) -> int:
    """Return the bytes of a row as this backend holds it."""
    return runs(kind, width)[-1].stop
