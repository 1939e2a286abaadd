"""Sizes as people write them. MB is 10^6 bytes, MiB is 2^20; knows nothing else."""

from __future__ import annotations

import re

KB, MB, GB = 10**3, 10**6, 10**9
KIB, MIB, GIB = 2**10, 2**20, 2**30

_UNITS = {
    "": 1, "b": 1,
    "k": KB, "kb": KB, "m": MB, "mb": MB, "g": GB, "gb": GB,
    "kib": KIB, "mib": MIB, "gib": GIB,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_MOST_DIGITS = 30  # far more become infinite, which is no number of bytes


def parse_size(text: str | int) -> int:
    """Return the bytes that `text` names: `300MB`, `1.5 GiB`, `300000000`.

    Raises `ConfigError` for anything else.
    """
    from edgelm.errors import ConfigError  # errors prints sizes, so it is the one that imports at the top

    if isinstance(text, bool) or (isinstance(text, int) and text <= 0):
        raise ConfigError(f"size must be positive, got {text!r}; write it like 300MB or 1GiB")
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    scale = _UNITS.get(match[2].lower()) if match else None
    if match is None or scale is None or len(match[1]) > _MOST_DIGITS:
        raise ConfigError(f"{text!r} is not a size; write it like 300MB, 1.5GB or 512MiB")
    n_bytes = int(float(match[1]) * scale)
    if n_bytes <= 0:
        raise ConfigError(f"size must be positive, got {text!r}; write it like 300MB or 1GiB")
    return n_bytes


def human(n_bytes: float) -> str:
    """Return a size in decimal units with three significant digits: `98.4 MB`."""
    for scale, unit in ((GB, "GB"), (MB, "MB"), (KB, "kB")):
        if abs(n_bytes) >= scale:
            return f"{n_bytes / scale:.3g} {unit}" if abs(n_bytes) < 999.5 * scale else f"{n_bytes / scale:.0f} {unit}"
    return f"{n_bytes:.0f} B"
