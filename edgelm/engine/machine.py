"""What the processor and the interpreter are, so that verdicts and measurements are not believed elsewhere.

Only reads; knows no backend.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from edgelm.hashing import blake2b


@cache
def cpu_model() -> str:
    """Return the name of the processor as its maker writes it, or the machine type where the system does not say."""
    fields = _cpuinfo()
    for field in ("model name", "Hardware", "Model", "cpu model", "uarch", "CPU part"):
        if fields.get(field):
            return fields[field]
    return _brand() or platform.machine() or "unknown"


@cache
def last_cache_bytes() -> int:
    """Return the size of the largest cache of the processor; 32 MiB where the system does not say."""
    sizes = []
    with suppress(OSError, ValueError):
        for level in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            text = level.read_text().strip()
            sizes.append(int(text.rstrip("KM")) << (20 if text.endswith("M") else 10))
    return max(sizes, default=32 << 20)


@cache
def machine_key() -> str:
    """Return a key of processor, its features, and interpreter: what is measured under one key holds under it."""
    fields = _cpuinfo()
    features = fields.get("flags") or fields.get("Features") or fields.get("isa") or ""
    facts = (cpu_model(), features, platform.machine(), sys.platform, sys.version)
    return digest(*facts)


def edgelm_version() -> str:
    """Return edgelm's version."""
    # not importlib.metadata: 10 ms; not `import edgelm`: the engine lies below it
    return str(getattr(sys.modules["edgelm"], "__version__", ""))


def file_facts(path: Path) -> str:
    """Return path, size and time of change of a file as one string."""
    try:
        facts = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def release(*modules: str) -> str:
    """Return edgelm's version, and the facts of these files of it: an editable install changes without a new number."""
    return " ".join((edgelm_version(), *(file_facts(Path(module)) for module in modules)))


def digest(*facts: object) -> str:
    """Return a short hexadecimal key of these facts."""
    return blake2b("\0".join(map(str, facts)).encode(), digest_size=10).hexdigest()


@cache
def _cpuinfo() -> dict[str, str]:
    """The facts of the first processor in /proc/cpuinfo; empty where there is no such file."""
    try:
        handle = os.open("/proc/cpuinfo", os.O_RDONLY)
    except OSError:
        return {}
    try:
        text = os.read(handle, 8192).decode(errors="replace")  # one read: the kernel writes only what is asked for
    finally:
        os.close(handle)
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    if "model name" not in fields:  # boards with ARM processors name themselves, not the processor
        with suppress(OSError):
            fields["Model"] = Path("/proc/device-tree/model").read_text(errors="replace").strip("\0\n ")
    return fields


def _brand() -> str:
    if sys.platform == "win32":
        return os.environ.get("PROCESSOR_IDENTIFIER", "")
    if sys.platform in ("darwin", "ios"):
        size = ctypes.c_size_t(256)
        text = ctypes.create_string_buffer(size.value)
        done = ctypes.CDLL(None).sysctlbyname(b"machdep.cpu.brand_string", text, ctypes.byref(size), None, 0)
        return text.value.decode(errors="replace") if done == 0 else ""
    return ""
