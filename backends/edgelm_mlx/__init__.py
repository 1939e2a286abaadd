"""MLX: Apple's array library, on the GPU of Apple silicon or, with its CPU build, on Linux (slowly, in one thread).

Weights are converted into MLX's affine quantization once; activations, and all sums, are float32. Importing this
module loads no library; `probe` and `open` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.backend import Availability, CacheLayout, Capabilities, WeightLayout
from edgelm.errors import BackendUnavailable

if TYPE_CHECKING:
    from edgelm_mlx.session import MlxSession

__all__ = ["BACKEND", "MlxBackend"]


class MlxBackend:
    """See `edgelm.engine.backend.Backend`."""

    name = "mlx"

    def probe(self) -> Availability:
        from edgelm_mlx.runtime import check

        try:
            return Availability(True, version=check())
        except BackendUnavailable as exc:
            return Availability(False, reason=exc.reason)

    def identity(self) -> str:
        """Return what changes whenever the library does; loads nothing."""
        from edgelm_mlx.runtime import identity

        return identity()

    def capabilities(self) -> Capabilities:
        from edgelm_mlx.forms import TYPES

        return Capabilities(TYPES, cache=CacheLayout(values="place_dim"))

    def layout(self) -> WeightLayout:
        from edgelm_mlx.layout import MlxLayout

        return MlxLayout()

    def open(self, n_threads: int) -> MlxSession:
        """Load the library. `n_threads` changes nothing: MLX computes on the GPU, or in one thread of its own."""
        from edgelm_mlx.session import MlxSession

        return MlxSession()


BACKEND = MlxBackend()
