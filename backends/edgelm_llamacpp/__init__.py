"""llama.cpp's ggml as the kernel library: graphs are built per segment and computed on edgelm's own memory.

Importing this module loads no library; `probe` and `open` do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgelm.engine.backend import Availability, Capabilities, Session
from edgelm.errors import BackendUnavailable
from edgelm.files.ggml_types import TensorType

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
)


KV_TYPES = ("f16", "q8_0", "q4_0")


class LlamaCppBackend:
    name = "llamacpp"

    def probe(self) -> Availability:
        from edgelm_llamacpp.ggml import load

        try:
            return Availability(True, version=load().version)
        except BackendUnavailable as exc:
            return Availability(False, reason=exc.reason)

    def identity(self) -> str:
        """Return what changes whenever the library does; loads nothing."""
        from edgelm_llamacpp.ggml import identity

        return identity()

    def capabilities(self) -> Capabilities:
        return Capabilities(
            types=frozenset(TensorType[name] for name in _TYPES), activations="int8", kv=frozenset(KV_TYPES)
        )

    def open(self, n_threads: int) -> Session:
        from edgelm_llamacpp.session import GgmlSession

        return GgmlSession(n_threads)

    def rounding(self, kind: TensorType) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]] | None:
        """Return what rounds rows of numbers to this type, if ggml does; see `edgelm.engine.backend.Rounding`."""
        from edgelm_llamacpp.rounding import rounding

        return rounding(kind)


BACKEND = LlamaCppBackend()
