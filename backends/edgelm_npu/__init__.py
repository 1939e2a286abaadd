"""The NPU backend: 8-bit programs of fixed shapes, and what such devices leave to the processor beside them.

Where there is no NPU it is *simulated*: the arithmetic and the order of an NPU, at the speed of this processor. It is
there so that an application can be written and tested before the device arrives, and is never chosen by itself.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgelm.engine.backend import Availability, Capabilities
from edgelm.errors import BackendUnavailable, EdgeLMError

if TYPE_CHECKING:
    from edgelm_npu.compiled import CompiledProducts
    from edgelm_npu.layout import Int8Layout
    from edgelm_npu.session import NpuSession

__all__ = ["BACKEND", "NpuBackend"]


class NpuBackend:
    """See `edgelm.engine.backend.Backend`. The environment says which device: see `edgelm_npu.providers`."""

    name = "npu"

    def probe(self) -> Availability:
        from edgelm_npu.devices import DEFAULT, DEVICES

        try:
            compiled = self._compiled()
        except EdgeLMError as exc:
            return Availability(False, getattr(exc, "reason", str(exc)))
        if compiled is not None:
            return Availability(True, version=compiled.version)
        return Availability(True, version=f"simulated NPU, scheduled as on a {DEVICES[DEFAULT].about}")

    def identity(self) -> str:
        from edgelm_npu.providers import VARIABLE

        facts = [__file__, os.environ.get(VARIABLE, "")]
        if facts[1]:
            found = find_spec("onnxruntime")
            if found is not None and found.origin:
                facts += [found.origin, str(os.stat(found.origin).st_mtime_ns)]
        return " ".join(facts)

    def capabilities(self) -> Capabilities:
        from edgelm.files.blocks import TYPES
        from edgelm_npu.providers import wanted

        simulated = wanted() is None
        return Capabilities(TYPES, streams=simulated, simulated=simulated)  # a provider copies: weights cannot move

    def layout(self) -> Int8Layout:
        from edgelm_npu.layout import Int8Layout

        return Int8Layout()

    def open(self, n_threads: int) -> NpuSession:
        if n_threads < 1:
            raise BackendUnavailable(self.name, f"it needs at least one thread, got {n_threads}", "pass --threads 1")
        compiled = self._compiled()
        if compiled is None:
            from edgelm_npu.session import NpuSession

            return NpuSession(n_threads)
        from edgelm_npu.compiled import CompiledSession

        return CompiledSession(n_threads, compiled)

    @staticmethod
    def _compiled() -> CompiledProducts | None:
        """Return the device that the environment asks for; None: the simulated one."""
        from edgelm_npu.providers import wanted

        found = wanted()
        if found is None:
            return None
        from edgelm_npu.compiled import CompiledProducts

        return CompiledProducts(*found)


BACKEND = NpuBackend()
