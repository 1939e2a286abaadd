"""The NPU backend: 8-bit programs of fixed shapes, and what such devices leave to the processor beside them.

Where there is no NPU it is *simulated*: the arithmetic and the order of an NPU, at the speed of this processor. It is
there so that an application can be written and tested before the device arrives, and is never chosen by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgelm.engine.backend import Availability, Capabilities
from edgelm.errors import BackendUnavailable

if TYPE_CHECKING:
    from edgelm_npu.layout import Int8Layout
    from edgelm_npu.session import NpuSession

__all__ = ["BACKEND", "NpuBackend"]


class NpuBackend:
    """See `edgelm.engine.backend.Backend`."""

    name = "npu"

    def probe(self) -> Availability:
        from edgelm_npu.devices import DEFAULT, DEVICES

        return Availability(True, version=f"simulated NPU, scheduled as on a {DEVICES[DEFAULT].about}")

    def capabilities(self) -> Capabilities:
        from edgelm_numpy.dequantize import TYPES

        return Capabilities(TYPES, simulated=True)

    def layout(self) -> Int8Layout:
        from edgelm_npu.layout import Int8Layout

        return Int8Layout()

    def open(self, n_threads: int) -> NpuSession:
        if n_threads < 1:
            raise BackendUnavailable(self.name, f"it needs at least one thread, got {n_threads}", "pass --threads 1")
        from edgelm_npu.session import NpuSession

        return NpuSession(n_threads)


BACKEND = NpuBackend()
