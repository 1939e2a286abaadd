"""What a running program sees: arrays from bound addresses, values so far, and when MLX has to compute.

MLX is lazy: an array is a promise until it is evaluated, and promises keep everything alive that they are made of.
Operations tell the frame what they have made; once that is much memory, or much work, it is all evaluated. So the
memory of a program is bounded, and a pass can be broken off. Knows no operation.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import Op, Weight
from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import row_bytes
from edgelm_mlx.runtime import Array

if TYPE_CHECKING:
    from edgelm_mlx.session import MlxSession


class Limits(NamedTuple):
    """How far a program goes before MLX has to compute.

    `flush_bytes`: arrays that may be promised; `flush_work`: multiplications. `tile_bytes`: what is made at a time of
    weights that are copied or widened. `cache_bytes`: freed arrays that MLX keeps; without any, the system clears new
    memory for every array.
    """

    flush_bytes: int
    flush_work: int
    tile_bytes: int
    cache_bytes: int


LIMITS = {
    "cpu": Limits(2 << 20, 1 << 28, 512 << 10, 8 << 20),  # 0.2 s of work on one core
    "gpu": Limits(16 << 20, 1 << 36, 4 << 20, 16 << 20),  # here waiting for an answer is what costs
}


def at(address: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Return the array that lies at `address`; no copy."""
    n_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    memory = (ctypes.c_ubyte * n_bytes).from_address(address)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


class Step(NamedTuple):
    """A lowered operation. `atom_bytes`: what it makes at most between two calls of `Frame.made`."""

    run: Callable[[Frame], None]
    atom_bytes: int


class Site(NamedTuple):
    """Where an operation stands: `first_weight` is the index of its first weight, `rows` and `width` its output's."""

    op: Op
    first_weight: int
    rows: int
    width: int
    shape: PassShape
    limits: Limits

    @property
    def out_bytes(self) -> int:
        return 4 * self.rows * self.width


@dataclass(slots=True)
class Frame:
    """One run. `values` maps ids to arrays float32 [rows, width]; `memo` holds what operations of one run share."""

    session: MlxSession
    shape: PassShape
    bindings: Bindings
    values: dict[int, Array] = field(default_factory=dict)
    memo: dict[object, Any] = field(default_factory=dict)
    _writes: list[tuple[Array, NDArray[Any], Any]] = field(default_factory=list)
    _pending_bytes: int = 0
    _pending_work: int = 0

    @property
    def mx(self) -> Any:
        return self.session.mx

    def made(self, n_bytes: int, work: int = 0, alive: Sequence[Array] = ()) -> None:
        """Count bytes of arrays that an operation has made, and multiplications. It still needs those in `alive`."""
        self._pending_bytes += n_bytes
        self._pending_work += work
        limits = self.session.limits
        if self._pending_bytes >= limits.flush_bytes or self._pending_work >= limits.flush_work:
            self.flush(alive)

    def flush(self, alive: Sequence[Array] = ()) -> None:
        """Compute all values, and `alive`; carry out the writes. Raises `Cancelled`."""
        self.session.check()
        self.mx.eval(*alive, *self.values.values(), *(source for source, _, _ in self._writes))
        for source, target, index in self._writes:
            target[index] = np.array(source, copy=False)
        self._writes.clear()
        self._pending_bytes = self._pending_work = 0

    def write_later(self, source: Array, target: NDArray[Any], index: Any = ...) -> None:
        """Have `source` copied to `target[index]` once it is computed."""
        self._writes.append((source, target, index))

    def copied(self, source: NDArray[Any]) -> Array:
        """Return an array with these numbers. For a moment there is another copy, if they do not lie in order."""
        return self.mx.array(np.ascontiguousarray(source))

    def raw(self, weight: Weight, index: int, rows: int) -> NDArray[np.uint8]:
        """The bytes of `rows` rows of the segment's weight number `index`, as they are in a file."""
        return at(self.bindings.weights[index], (rows, row_bytes(weight.type, weight.width)), np.uint8)

    def vector(self, weight: Weight, index: int) -> Array:
        """A weight of one row, as float32 [width]."""
        address = self.bindings.weights[index]
        return self.session.adopted[address][0] if address < 0 else hold_vector(self.mx, weight, address)

    def positions(self) -> NDArray[np.int32]:
        return at(self.bindings.positions, (self.shape.n_tokens,), np.int32)


def hold_vector(mx: Any, weight: Weight, address: int) -> Array:
    """Return a weight of one row as MLX's own, float32 [width]."""
    raw = at(address, (1, row_bytes(weight.type, weight.width)), np.uint8)
    return mx.array(dequantize(weight.type, raw).reshape(weight.width))
