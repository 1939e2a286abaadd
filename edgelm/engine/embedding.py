"""Texts as vectors: the last states of an encoder's pass, pooled as the file says. Imports no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.running import Running
from edgelm.errors import ContextOverflow, UnsupportedModel
from edgelm.files.meta import Meta
from edgelm.files.model import ModelFile

Floats: TypeAlias = NDArray[np.float32]
Pooling: TypeAlias = Literal["none", "mean", "cls", "last"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""By their numbers in `pooling_type`."""


def pooling_of(file: ModelFile) -> Pooling:
    """Return how the file pools the rows of a text; a file that does not say pools nothing.

    Raises `UnsupportedModel` for a way that edgelm does not have.
    """
    number = Meta.of(file).int("pooling_type", default=0)
    if number >= len(POOLINGS):
        raise UnsupportedModel(
            f"the model's pooling_type is {number} (known: 0 to {len(POOLINGS) - 1}, {', '.join(POOLINGS)}); "
            "a model that ranks texts is not one that embeds them"
        )
    return POOLINGS[number]


def encode(engine: Running, ids: Sequence[int]) -> Floats:
    """Return the last states of `ids`, float32 [n_tokens, dim], computed in one pass; valid until the next.

    Raises `ContextOverflow` with both numbers.
    """
    if len(ids) > engine.plan.context:
        raise ContextOverflow(len(ids), engine.plan.context)
    rows = engine.verify(ids, range(-1, len(ids) - 1))
    found = np.empty((len(rows), engine.n_vocab), np.float32)
    for i, row in enumerate(found):
        row[:] = rows[i]  # put together from tiles in memory that the next row takes again
    return found


def pool(rows: Floats, pooling: Pooling) -> Floats:
    """Return one vector [dim] for the rows [n_tokens, dim] of a text; "none": the rows themselves."""
    if pooling == "mean":
        mean: Floats = rows.mean(axis=0)
        return mean
    return rows if pooling == "none" else rows[0 if pooling == "cls" else -1]


def normalized(vectors: Floats) -> Floats:
    """Return vectors [..., dim] with a length of 1; one that is all zeros stays so."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    lengths[lengths == 0] = 1
    unit: Floats = vectors / lengths
    return unit
