"""Devices with an NPU whose speed is *simulated*: a table, and what a task costs by it. Pure.

The figures are peaks that makers publish, and shares of them that are assumed; no such device was measured. A product
takes the longer of its arithmetic and its bytes, then what it costs to start it on the NPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NPU_SHARE, CPU_SHARE, MEMORY_SHARE = 0.25, 0.25, 0.6
"""Shares of the peaks that products, float operations and reads are assumed to reach. llm.npu's 1,000 tokens a second
of a model of 1.8 G weights are 3.6 Tops a second end to end, on an NPU of 45."""


@dataclass(frozen=True, slots=True)
class NpuDevice:
    """A device: peaks of its NPU (8-bit operations a second), its cores (float32) and their common memory.

    `start_s`: what each subgraph costs on the NPU besides. `sync_s`: when the other processor sees a result.
    """

    name: str
    npu_ops_per_s: float
    cpu_flops_per_s: float
    bytes_per_s: float
    start_s: float
    sync_s: float
    about: str

    def product_s(self, rows: int, width: int, outputs: int) -> float:
        """Seconds of an 8-bit product of `rows` (padding included) with a matrix of `outputs` rows on the NPU."""
        arithmetic = 2.0 * rows * width * outputs / (self.npu_ops_per_s * NPU_SHARE)
        n_bytes = width * outputs + rows * width + 4 * rows * outputs
        return max(arithmetic, self._memory_s(n_bytes))

    def float_s(self, operations: float, n_bytes: float) -> float:
        """Seconds of float operations on the cores."""
        return max(operations / (self.cpu_flops_per_s * CPU_SHARE), self._memory_s(n_bytes))

    def _memory_s(self, n_bytes: float) -> float:
        return n_bytes / (self.bytes_per_s * MEMORY_SHARE)


_TABLE = (
    # cores: one X4 at 3.3 GHz, five A720 at 3 GHz, two A520; LPDDR5X-9600 on 64 bits
    NpuDevice("hexagon-v75", 45e12, 350e9, 77e9, 20e-6, 50e-6, "phone with a Snapdragon 8 Gen 3"),
    # four P-cores and four E-cores; LPDDR5X-8533 on 128 bits
    NpuDevice("intel-npu4", 48e12, 700e9, 136e9, 20e-6, 50e-6, "laptop with a Core Ultra 200V"),
    # four Zen 5 and eight Zen 5c cores; LPDDR5X-7500 on 128 bits
    NpuDevice("xdna2", 50e12, 1500e9, 120e9, 20e-6, 50e-6, "laptop with a Ryzen AI 300"),
    # four A76 at 2.4 GHz; LPDDR4X-4224 on 64 bits
    NpuDevice("rk3588", 6e12, 150e9, 34e9, 50e-6, 100e-6, "single-board computer with an RK3588"),
)
DEVICES: Mapping[str, NpuDevice] = MappingProxyType({device.name: device for device in _TABLE})
DEFAULT = "hexagon-v75"
