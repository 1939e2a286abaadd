"""Rows of MLX's affine quantization: read as MLX reads them, and held by ggml's types as `holder` says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgelm.files.affine import as_ggml, holder, split_rows
from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import AFFINE_TYPES, Affine, TensorType, row_bytes, tensor_type

N_ROWS, WIDTH = 5, 256


def rows_of(mx: Any, form: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Return random rows as MLX quantizes them, and MLX's own weights of them."""
    dtype = {TensorType.F16: mx.float16, TensorType.BF16: mx.bfloat16, TensorType.F32: mx.float32}[form.scales]
    weights = mx.array(np.random.default_rng(0).normal(0, 0.05, (N_ROWS, WIDTH)).astype(np.float32)).astype(dtype)
    arrays = mx.quantize(weights, group_size=form.group, bits=form.bits)
    words, scales, biases = (array.view(mx.uint8) for array in arrays)
    exact = mx.dequantize(arrays[0], *(a.astype(mx.float32) for a in arrays[1:]), group_size=form.group, bits=form.bits)
    return np.concatenate([np.array(part) for part in (words, scales, biases)], axis=1), np.array(exact)


@pytest.mark.parametrize("kind", sorted(AFFINE_TYPES), ids=lambda kind: kind.name)
def test_weights_are_those_of_mlx(kind: TensorType) -> None:
    mx = pytest.importorskip("mlx.core")
    form = kind.affine
    assert form is not None
    assert form.type is kind
    rows, theirs = rows_of(mx, form)
    assert rows.shape[1] == row_bytes(kind, WIDTH)
    assert np.array_equal(dequantize(kind, rows), theirs)
    held, loss = holder(form)
    converted = dequantize(held, as_ggml(form, rows))
    exact = form.bits < 6 and form.scales is not TensorType.F32
    assert np.array_equal(converted, theirs) == exact
    assert np.abs(converted - theirs).max() <= np.abs(theirs).max() * 2.0**-9
    assert bool(loss) == (form.bits >= 6 or form.scales is not TensorType.F16)


def test_a_scale_beyond_float16_is_an_error() -> None:
    form = Affine(4, 32, TensorType.BF16)
    rows = np.zeros((1, row_bytes(form.type, 32)), np.uint8)
    rows[0, 16:18] = np.frombuffer(np.float32(1e30).tobytes()[2:], np.uint8)
    assert split_rows(form, rows)[1][0, 0] == pytest.approx(1e30, rel=0.01)
    with pytest.raises(OverflowError):
        as_ggml(form, rows)


def test_small_bfloat16_scales_are_rounded_as_stated() -> None:
    form = Affine(4, 32, TensorType.BF16)
    rows = np.zeros((1, row_bytes(form.type, 32)), np.uint8)
    for exponent, exact in ((-17, True), (-18, False)):
        rows[0, 16:18] = np.frombuffer(np.float32((2 - 2.0**-7) * 2.0**exponent).tobytes()[2:], np.uint8)
        scale = as_ggml(form, rows)[0, :2].view(np.float16).astype(np.float32)
        assert (scale[0] == split_rows(form, rows)[1][0, 0]) == exact
        assert abs(scale[0] - split_rows(form, rows)[1][0, 0]) <= 2.0**-25


def test_files_cannot_hold_affine_ids() -> None:
    from edgelm.errors import UnsupportedModel

    for kind in AFFINE_TYPES:
        with pytest.raises(UnsupportedModel):
            tensor_type(int(kind))
