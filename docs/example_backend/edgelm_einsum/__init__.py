"""A backend as an example: every operation in float32 with NumPy's einsum. Slow, exact, and complete.

Importing this module imports nothing heavy: `open` does.
"""

from edgelm.engine.backend import Availability, Capabilities, Session
from edgelm.files.ggml_types import TensorType


class EinsumBackend:
    name = "einsum"

    def probe(self) -> Availability:
        import numpy

        return Availability(True, version=f"einsum of NumPy {numpy.__version__}")

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({TensorType.F32, TensorType.F16, TensorType.Q8_0}))

    def open(self, n_threads: int) -> Session:
        from edgelm_einsum.session import EinsumSession

        return EinsumSession()


BACKEND = EinsumBackend()
