"""The NumPy backend: every operation in float32, as plainly as it can be written. Other backends are compared with it.

It needs nothing that edgelm does not need anyway, streams, and reads every tensor type of `edgelm.files.blocks.TYPES`.
`n_threads` are Python threads that share the rows of a matrix; BLAS itself is kept on one thread while a session is
open (OpenBLAS only; another BLAS keeps its own setting).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.backend import Availability, Capabilities
from edgelm.errors import BackendUnavailable

if TYPE_CHECKING:
    from edgelm_numpy.session import NumpySession

__all__ = ["BACKEND", "NumpyBackend"]


class NumpyBackend:
    """See `edgelm.engine.backend.Backend`."""

    name = "numpy"

    def probe(self) -> Availability:
        import numpy as np

        from edgelm.engine.lanes import BlasThreads

        blas = "OpenBLAS" if BlasThreads().found else "another BLAS, whose threads edgelm cannot limit"
        return Availability(True, version=f"NumPy {np.__version__} with {blas}")

    def capabilities(self) -> Capabilities:
        from edgelm.files.blocks import TYPES

        return Capabilities(TYPES, kv=frozenset({"f16", "q8_0", "q4_0"}))

    def open(self, n_threads: int) -> NumpySession:
        if n_threads < 1:
            raise BackendUnavailable(self.name, f"it needs at least one thread, got {n_threads}", "pass --threads 1")
        from edgelm_numpy.session import NumpySession

        return NumpySession(n_threads)


BACKEND = NumpyBackend()
