"""What a model may take of this device, or of one that is simulated: memory and threads."""

from __future__ import annotations

from edgelm.errors import ConfigError
from edgelm.memory.platform import current_platform
from edgelm.memory.predict import Rates
from edgelm.simulated import Device, Processor, devices, get_device
from edgelm.sizes import human, parse_size

SPARE_SHARE = 0.8
"""Share of the available memory that a model without a stated budget may take: the rest is the device's margin."""

MOST_THREADS = 512
"""As in ggml. Backends start what they are told to start: a mistyped number would take the whole machine."""


def device_of(simulate: str | None, threads: int | None, published: bool = False) -> Device | None:
    """Return the device that is simulated, if any; it has a processor only if that is to be the `published` one."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if threads is not None and threads > MOST_THREADS:
        raise ConfigError(f"threads must be at most {MOST_THREADS}, got {threads}")
    if simulate is None:
        if published:
            raise ConfigError("published figures are those of a device; name it with simulate")
        return None
    device = get_device(simulate)
    if published and device.processor is None:
        known = ", ".join(name for name, one in devices().items() if one.processor)
        raise ConfigError(f"nothing is known of the processor of {simulate} (known: {known})")
    return device if published else device._replace(processor=None)


def published_rates(processor: Processor, flash_bytes_per_s: float) -> Rates:
    """Return what a device does by figures of others. What a pass takes beside its weights is within them."""
    return Rates(
        flash_bytes_per_s, processor.compute_bytes_per_s, wide_bytes_per_s=processor.wide_bytes_per_s, published=True
    )


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
