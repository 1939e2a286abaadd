"""The table of tensor types, against the gguf package."""

from __future__ import annotations

import pytest

from edgelm.errors import UnsupportedModel
from edgelm.files.ggml_types import REMOVED, TYPES, TensorType, row_bytes, tensor_type

STALE_IN_GGUF = {"Q8_1"}  # gguf-py says 40 bytes; ggml asserts 36 at compile time, and no file has this type


def test_every_type_has_a_size() -> None:
    assert set(TYPES) == set(TensorType)
    assert not set(REMOVED) & set(TensorType)


def test_ids_and_sizes_agree_with_gguf() -> None:
    gguf = pytest.importorskip("gguf")
    for kind, sizes in gguf.GGML_QUANT_SIZES.items():
        assert TensorType[kind.name] == int(kind)
        if kind.name not in STALE_IN_GGUF:
            assert TYPES[TensorType[kind.name]] == sizes


def test_row_bytes() -> None:
    assert row_bytes(TensorType.Q4_K, 512) == 2 * 144
    assert row_bytes(TensorType.F32, 3) == 12
    assert TensorType.Q6_K.block_size == 256
    assert TensorType.Q6_K.block_bytes == 210


def test_a_row_is_whole_blocks() -> None:
    with pytest.raises(AssertionError, match="whole number"):
        row_bytes(TensorType.Q8_0, 33)


@pytest.mark.parametrize("type_id", sorted(REMOVED))
def test_removed_types_are_named(type_id: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"{REMOVED[type_id]} .*was removed"):
        tensor_type(type_id)


@pytest.mark.parametrize("type_id", [43, 1000, 2**32 - 1])
def test_unknown_types(type_id: int) -> None:
    with pytest.raises(UnsupportedModel, match=f"id {type_id} is not known"):
        tensor_type(type_id)
