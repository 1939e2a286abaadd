"""The ONNX Runtime backend: the default on processors, needs no compiler.

Matrices are brought into ONNX Runtime's own packed layout once (`layout`), exactly; the window then holds packed bytes,
and the kernels of a session are pointed to them (`kernels`), wherever they lie. Everything else is operators of ONNX.
Models that come as one ONNX graph are computed as they come (`graph_session`).
Importing this imports no library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.backend import Availability, CacheLayout, Capabilities
from edgelm.errors import BackendUnavailable

if TYPE_CHECKING:
    from edgelm.engine.backend import GraphSession, WeightLayout
    from edgelm.files.graph import GraphModel
    from edgelm_onnx.session import OnnxSession

__all__ = ["BACKEND", "OnnxBackend"]


class OnnxBackend:
    """See `edgelm.engine.backend.Backend`."""

    name = "onnx"

    def probe(self) -> Availability:
        from edgelm_onnx.proof import prove
        from edgelm_onnx.runtime import version

        try:
            found = f"onnxruntime {version()}"
        except BackendUnavailable as exc:
            return Availability(False, exc.reason)
        try:
            prove()
        except BackendUnavailable as exc:  # packed weights lie elsewhere, as on aarch64; a graph keeps its own
            return Availability(False, exc.reason, found, graphs=True)
        return Availability(True, version=found)

    def identity(self) -> str:
        """Return what changes with the installed library; see `edgelm.engine.health.identity`."""
        from edgelm_onnx.runtime import installed

        return installed()

    def capabilities(self) -> Capabilities:
        from edgelm.files.blocks import TYPES

        cache = CacheLayout(item="f16", values="place_dim", rings=False)
        return Capabilities(TYPES, cache=cache, activations="int8")

    def layout(self) -> WeightLayout:
        from edgelm_onnx.layout import OnnxLayout

        return OnnxLayout()

    def open(self, n_threads: int) -> OnnxSession:
        if n_threads < 1:
            raise BackendUnavailable(self.name, f"it needs at least one thread, got {n_threads}", "pass --threads 1")
        from edgelm_onnx.session import OnnxSession

        return OnnxSession(n_threads)

    def open_graph(self, model: GraphModel, n_threads: int) -> GraphSession:
        """See `edgelm.engine.backend.GraphBackend`."""
        from edgelm_onnx.graph_session import OnnxGraphSession

        return OnnxGraphSession(model, n_threads)


BACKEND = OnnxBackend()
