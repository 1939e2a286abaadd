"""What a model may take of this device, or of one that is simulated: memory and threads."""

from __future__ import annotations

from edgelm.errors import ConfigError
from edgelm.memory.platform import current_platform
from edgelm.simulated import Device, get_device
from edgelm.sizes import human, parse_size

SPARE_SHARE = 0.8
"""Share of the available memory that a model without a stated budget may take: the rest is the device's margin."""


def device_of(simulate: str | None, threads: int | None) -> Device | None:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    return get_device(simulate) if simulate is not None else None


def threads_of(threads: int | None, device: Device | None) -> int:
    cores = current_platform().cores()
    return threads or (min(cores, device.n_threads) if device else cores)


def budget_of(memory: str | int | None, device: Device | None) -> tuple[int, tuple[str, ...]]:
    """Return the budget in bytes and, if nobody stated one or a device is simulated, a sentence on that."""
    simulated = (
        (f"simulated flash of {device}; the processor is this machine's own, not slowed down",) if device else ()
    )
    if memory is None and device:
        memory = device.memory_bytes
    if memory is not None:
        return parse_size(memory), simulated
    platform = current_platform()
    available = platform.available_bytes() + platform.rss_bytes()
    budget = int(available * SPARE_SHARE)
    return budget, (
        f"no --memory given: {human(budget)} is the budget, {SPARE_SHARE:.0%} of the {human(available)} free here",
    )
