"""Devices that can be simulated: how fast their flash is, and how many cores and how much memory they can spare.

A table and nothing else: who opens a model slows its reads down (`ThrottledStore`). Processors are not simulated; of
some their published speed is known, by which a plan can say what to expect of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from edgelm.errors import ConfigError
from edgelm.sizes import GB, MB, human


class Processor(NamedTuple):
    """What others measured of a processor with llama.cpp, all cores together, in bytes of weights a second.

    `compute_bytes_per_s`: one token after the other, `wide_bytes_per_s`: bytes times tokens of a long prompt. Both
    hold what a pass takes beside its weights, of the model that was measured; a smaller one loses more of its time so.
    """

    compute_bytes_per_s: float
    wide_bytes_per_s: float
    source: str


class Device(NamedTuple):
    """What a device is simulated by.

    `flash_bytes_per_s` is what large reads reach in practice, not what the bus or the package promises; `latency_s`
    is the time each read takes besides; `memory_bytes` is the budget that an assistant on such a device may have.
    `processor` is what is published of it, if anything is.
    """

    name: str
    flash_bytes_per_s: float
    latency_s: float
    n_threads: int
    memory_bytes: int
    about: str
    processor: Processor | None = None

    def read_bytes_per_s(self, n_bytes: int) -> float:
        """Return the speed of reads of `n_bytes`, latency included."""
        return n_bytes / (self.latency_s + n_bytes / self.flash_bytes_per_s)

    def __str__(self) -> str:
        return f"{self.name} ({human(self.flash_bytes_per_s)}/s, {self.latency_s * 1e3:g} ms a read)"


_CORTEX_A72 = Processor(
    3.4 * GB, 11.7 * GB,
    # qwen:1.8b in Q4_0, 1.12 GB; TinyLlama in Q8_0, 1.17 GB, which decodes at 3.5 GB/s
    "Ollama 0.1.42, qwen:1.8b at 3.05 tok/s (aidatatools/ollama-benchmark#9); "
    "prompts: llama.cpp of March 2024, TinyLlama Q8_0 at 10 tok/s (justine.lol/matmul)",
)  # fmt: skip
_CORTEX_A76 = Processor(
    9.9 * GB, 41 * GB,
    # llama3.2:3b in Q4_K_M, 2.02 GB; TinyLlama in Q8_0, 1.17 GB, which decodes at 10.5 GB/s
    "Ollama, llama3.2:3b at 4.88 tok/s, firmware of January 2025 (geerlingguy/ai-benchmarks#7); "
    "prompts: llama.cpp of March 2024, TinyLlama Q8_0 at 35 tok/s (justine.lol/matmul)",
)  # fmt: skip
_TABLE = (
    # the slot runs in DDR50 mode: 50 MB/s at the most, and common A1 cards answer 4 KB reads 2,000 times a second
    Device("pi4-sd", 45 * MB, 0.5e-3, 4, 500 * MB, "Raspberry Pi 4 with 1 GB, A1 microSD card", _CORTEX_A72),
    # USB 3 with UASP: adapters are commonly measured at 330 to 370 MB/s
    Device("pi4-usb-ssd", 350 * MB, 0.2e-3, 4, 1 * GB, "Raspberry Pi 4 with 2 GB, SATA SSD on USB 3", _CORTEX_A72),
    # the slot runs in SDR104 mode: 104 MB/s at the most, 85 to 95 MB/s measured with A2 cards
    Device("pi5-sd", 90 * MB, 0.3e-3, 4, 1 * GB, "Raspberry Pi 5 with 2 GB, A2 microSD card", _CORTEX_A76),
    # one lane of PCIe 2.0, as shipped: 500 MB/s on the wire, about 450 MB/s measured
    Device(
        "pi5-nvme", 450 * MB, 0.1e-3, 4, 2 * GB, "Raspberry Pi 5 with 4 GB, NVMe SSD on one PCIe 2.0 lane", _CORTEX_A76
    ),
    # the same lane at PCIe 3.0 speed, which works as a rule but is not certified: 707 to 739 MB/s measured
    # (geerlingguy/raspberry-pi-pcie-devices#631, #632, #565)
    Device(
        "pi5-nvme-gen3",
        720 * MB,
        0.1e-3,
        4,
        2 * GB,
        "Raspberry Pi 5 with 4 GB, NVMe SSD, lane set to PCIe 3.0",
        _CORTEX_A76,
    ),
    # eMMC 5.1 in HS400 mode: 400 MB/s on the bus, 250 to 300 MB/s in phones
    Device("phone-emmc", 270 * MB, 0.25e-3, 4, 500 * MB, "entry-level phone with 3 GB, eMMC 5.1"),
    # UFS 3.1: 2.1 GB/s promised by makers, 1.5 to 1.9 GB/s in storage benchmarks of phones
    Device("phone-ufs3", 1.6 * GB, 0.1e-3, 4, 2 * GB, "phone with 8 GB, UFS 3.1"),
    # SATA III: 600 MB/s on the wire, 520 to 560 MB/s with any SSD
    Device("laptop-sata", 530 * MB, 0.1e-3, 4, 3 * GB, "laptop with 8 GB, SATA SSD"),
)
_DEVICES = MappingProxyType({device.name: device for device in _TABLE})


def devices() -> Mapping[str, Device]:
    """Return every device that `simulate` knows, by name."""
    return _DEVICES


def get_device(name: str) -> Device:
    """Return the device of this name. Raises `ConfigError` with the names that are known."""
    if name not in _DEVICES:
        raise ConfigError(f"unknown device {name!r} (known: {', '.join(_DEVICES)})")
    return _DEVICES[name]
