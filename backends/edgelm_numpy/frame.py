"""What a running program sees: arrays on bound addresses, scratch memory, threads; and what a lowered operation is.

Knows no operation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.arrays import at as at
from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import Op, Weight
from edgelm.engine.lanes import Lanes
from edgelm.files.blocks import Floats, dequantize
from edgelm.files.ggml_types import TensorType, row_bytes


@dataclass(slots=True)
class Frame:
    """One run. `values` maps ids to float32 [rows, width]; `work[lane]` is float32 scratch memory of a thread.

    `memo` holds what several operations of one run share, such as the angles of the positions.
    """

    shape: PassShape
    bindings: Bindings
    values: dict[int, Floats]
    lanes: Lanes
    work: list[Floats]
    memo: dict[object, Any] = field(default_factory=dict)

    def raw(self, weight: Weight, index: int, rows: int) -> NDArray[np.uint8]:
        """The bytes of `rows` rows of the segment's weight number `index`."""
        return at(self.bindings.weights[index], (rows, row_bytes(weight.type, weight.width)), np.uint8)

    def vector(self, weight: Weight, index: int) -> Floats:
        """A weight of one row, as float32 [width]."""
        if weight.type is TensorType.F32:
            return at(self.bindings.weights[index], (weight.width,), np.float32)
        return dequantize(weight.type, self.raw(weight, index, 1)).reshape(weight.width)

    def positions(self) -> NDArray[np.int32]:
        return at(self.bindings.positions, (self.shape.n_tokens,), np.int32)


@dataclass(frozen=True, slots=True)
class Step:
    """A lowered operation. `lane_floats`: what it uses of `Frame.work[lane]`; `heap_bytes`: what NumPy allocates."""

    run: Callable[[Frame], None]
    lane_floats: int = 0
    heap_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operation stands: `first_weight` is the index of its first weight, `rows` and `width` its output's."""

    op: Op
    first_weight: int
    rows: int
    width: int
    shape: PassShape
    n_lanes: int
