"""What generation, statistics and `Model` ask of a model that is loaded, however it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.rows import Rows
from edgelm.memory.plan import Plan
from edgelm.memory.spill_shape import Traffic
from edgelm.memory.timeline import Times


class Running(Protocol):
    """One model, one conversation. Not thread-safe: `Model` queues its callers.

    `edgelm.engine.forward.Engine` computes recorded models in segments, `edgelm.engine.whole.WholeEngine` models that
    come as one graph.
    """

    plan: Plan
    times: Times
    n_threads: int
    n_vocab: int

    @property
    def max_rows(self) -> int:
        """Rows of logits that `verify` has room for; 1: there is none for drafts."""

    @property
    def trees(self) -> bool:
        """Whether the rows of a verified pass may branch; else each follows the one before it."""

    @property
    def n_past(self) -> int:
        """Positions stored in the cache."""

    @property
    def bytes_streamed(self) -> int:
        """Bytes of weights read from flash so far, those that were loaded for good not counted."""

    @property
    def kv_traffic(self) -> Traffic:
        """Bytes of keys and values written to flash and read back so far, where they do not fit in memory."""

    def forward(
        self, ids: Sequence[int], n_outputs: int = 1, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Append `ids` to the cache; return the logits [n_outputs, n_vocab] of the last positions."""

    def verify(self, ids: Sequence[int], parents: Sequence[int]) -> Rows:
        """Compute a pass over drafted ids without storing them; return the logits of every row.

        `parents[i]` is the row before row i, -1 the last stored position; a row sees what is stored, its ancestors and
        itself. The result is valid until the next pass. `keep` stores rows of it.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Store rows of the last verified pass that lie on one path from its root, in order."""

    def truncate(self, n_past: int) -> int:
        """Forget positions from `n_past` on; return how many are kept, which may be fewer."""

    def cancel(self, on: bool = True) -> None:
        """Break off the running pass (it raises `Cancelled`), from any thread; `on=False` allows passes again."""

    def carry_out(self, plan: Plan) -> None:
        """Go over to another plan between two passes; the cache stays."""

    def close(self) -> None:
        """Give all memory back. Safe to call twice."""
