"""Where the weights of a segment lie while they are computed on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from edgelm.engine.adopting import AdoptedWeights
from edgelm.engine.ir import Placed, Weight
from edgelm.files.model import TensorInfo
from edgelm.memory.pinned import PinnedWeights
from edgelm.memory.window import Run


class Address(NamedTuple):
    """Where a weight lies: `fixed` ones for good, others at a distance from where their run is held."""

    fixed: bool
    at: int


class Located(NamedTuple):
    """The memory of weights: pinned, adopted by the backend, or moving through slots."""

    tensors: Mapping[str, TensorInfo]
    pinned: PinnedWeights
    adopted: AdoptedWeights | None

    def __call__(self, run: Run, placed: Placed) -> tuple[Address | None, ...]:
        """Return the addresses of a segment's weights in the order of its operations; None: gathered apart."""
        starts = {part.tensor: (run.unit.offset_of(part), part.first_row) for part in run.unit.parts}

        def find(weight: Weight) -> Address:
            info = self.tensors[weight.tensor]
            if self.adopted is not None and (run.pinned or info.n_rows == 1):
                return Address(True, self.adopted[weight])
            if info.n_rows == 1:
                return Address(True, self.vector(weight))
            if run.pinned or weight.tensor not in starts:  # small tables are pinned like vectors
                return Address(True, self.pinned.address(info.file, info.offset + weight.first_row * info.row_bytes))
            at, first = starts[weight.tensor]
            return Address(False, at + (weight.first_row - first) * info.row_bytes)

        located: list[Address | None] = []
        weights = iter(placed.weights)
        for op in placed.segment.ops:  # the rows of the embedding are gathered apart
            located.extend(
                None if op.kind == "embed" else find(weight) for weight in (next(weights) for _ in op.weights)
            )
        return tuple(located)

    def vector(self, weight: Weight) -> int:
        """Return where a vector lies while it is pinned; of a bias, some columns may be meant."""
        info = self.tensors[weight.tensor]
        return self.pinned.address(info.file, info.offset + weight.first_row * info.row_bytes // info.shape[0])


def computed_on(placed: Placed) -> Iterator[Weight]:
    """Yield the weights of a segment but for the rows that are gathered apart."""
    weights = iter(placed.weights)
    for op in placed.segment.ops:
        for weight in (next(weights) for _ in op.weights):
            if op.kind != "embed":
                yield weight
