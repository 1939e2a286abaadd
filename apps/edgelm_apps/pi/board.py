"""What board this is and what its weights would be read from, as the kernel tells it in /proc and /sys.

Every function takes the root of those trees, so that a test can show another machine. Measures nothing.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
_MODEL_FILES = ("proc/device-tree/model", "sys/firmware/devicetree/base/model")
_GENERATION = re.compile(r"Raspberry Pi (?:Compute Module )?(\d)")
_KINDS = {"mmcblk": "SD card", "nvme": "NVMe SSD", "sd": "SATA disk"}
_PCIE_LANES = {"2.5 GT/s": "1.0", "5.0 GT/s": "2.0", "8.0 GT/s": "3.0"}


class Board(NamedTuple):
    """A Raspberry Pi. `generation` is 5 for a Pi 5, a Pi 500 or a Compute Module 5; None for what is not numbered."""

    model: str
    generation: int | None
    memory_bytes: int
    free_bytes: int


class Flash(NamedTuple):
    """The drive that a folder is on. `link` says how it is connected, where the kernel tells."""

    kind: str
    disk: str | None
    link: str | None

    def __str__(self) -> str:
        return self.kind + (f" {self.disk}" if self.disk else "") + (f" on {self.link}" if self.link else "")


def read_board(root: Path = ROOT) -> Board | None:
    """Return the Raspberry Pi that this is; None for any other machine."""
    model = next(filter(None, (_text(root / name) for name in _MODEL_FILES)), "")
    if not model.startswith("Raspberry Pi"):
        return None
    found = _GENERATION.match(model)
    total, free = (_memory_bytes(root, name) for name in ("MemTotal", "MemAvailable"))
    return Board(model, int(found[1]) if found else None, total, free)


def _memory_bytes(root: Path, name: str) -> int:
    """Return one line of /proc/meminfo; 0 if there is none."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def flash_under(folder: Path, root: Path = ROOT, number: int | None = None) -> Flash:
    """Return the drive that holds `folder` (or the nearest folder above it that exists); `number`: of its device."""
    if number is None:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        number = folder.stat().st_dev
    block = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if not block.exists():  # an overlay, a network or a memory file system
        return Flash("a file system without a drive of its own", None, None)
    place = block.resolve()
    disk = place.parent if (place / "partition").exists() else place
    kind = next((kind for start, kind in _KINDS.items() if disk.name.startswith(start)), "drive")
    if kind == "SD card" and _text(disk / "device/type") == "MMC":
        kind = "eMMC"
    if kind == "SATA disk" and "/usb" in str(disk):
        return Flash("USB drive", disk.name, _usb_link(disk))
    return Flash(kind, disk.name, _pcie_link(disk) if kind == "NVMe SSD" else None)


def warnings(root: Path = ROOT) -> list[str]:
    """Return sentences on what is set up on this board so that models run worse than they could."""
    found = []
    if sys.maxsize < 2**32:
        found.append("this Python is a 32-bit one, for which there are no wheels; use 64-bit Raspberry Pi OS")
    if not memory_limits(root):
        found.append(
            "the kernel keeps no memory limits here, so MemoryMax of a service is ignored, and the budget alone holds; "
            "add cgroup_enable=memory to /boot/firmware/cmdline.txt to have them"
        )
    return found


def memory_limits(root: Path = ROOT) -> bool:
    """Say whether the kernel can limit the memory of a service; the firmware of a Raspberry Pi switches that off."""
    return "memory" in _text(root / "sys/fs/cgroup/cgroup.controllers").split()


def _usb_link(disk: Path) -> str | None:
    """Return the speed of the USB device that a disk belongs to."""
    for folder in disk.parents:
        if speed := _text(folder / "speed"):
            return f"USB at {speed} Mbit/s"
    return None


def _pcie_link(disk: Path) -> str | None:
    controller = disk / "device/device"
    speed, width = (_text(controller / name) for name in ("current_link_speed", "current_link_width"))
    generation = next((number for start, number in _PCIE_LANES.items() if speed.startswith(start)), None)
    return f"PCIe {generation} x{width}" if generation and width else None


def _text(path: Path) -> str:
    """Return what a file of the kernel says; nothing if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""
