"""Pieces of /proc and /sys as the kernel of a Raspberry Pi shows them, below a folder of a test."""

from __future__ import annotations

import os
from pathlib import Path

PI5, PI4 = "Raspberry Pi 5 Model B Rev 1.0", "Raspberry Pi 4 Model B Rev 1.4"
SD, NVME, USB = os.makedev(179, 2), os.makedev(259, 2), os.makedev(8, 2)
MEMINFO = "MemTotal:        4147920 kB\nMemFree:          912000 kB\nMemAvailable:    3000000 kB\n"


def board(root: Path, model: str = PI5, celsius: float = 52.3, throttled: str = "0", limits: bool = True) -> Path:
    """Make `root` look like a board; the kernel ends its model with a zero byte."""
    put(root / "proc/device-tree/model", model + "\0")
    put(root / "proc/meminfo", MEMINFO)
    put(root / "sys/class/thermal/thermal_zone0/type", "cpu-thermal\n")
    put(root / "sys/class/thermal/thermal_zone0/temp", f"{celsius * 1000:.0f}\n")
    put(root / "sys/devices/platform/soc/soc:firmware/get_throttled", f"{throttled}\n")
    put(root / "sys/fs/cgroup/cgroup.controllers", "cpu io memory pids\n" if limits else "cpu io pids\n")
    return root


def sd_card(root: Path, kind: str = "SD") -> int:
    disk = root / "sys/devices/platform/axi/1000fff000.mmc/mmc_host/mmc0/mmc0:aaaa/block/mmcblk0"
    put(disk.parents[1] / "type", f"{kind}\n")
    (disk / "mmcblk0p2").mkdir(parents=True)
    (disk / "device").symlink_to("../..")
    return partition(root, disk / "mmcblk0p2", SD)


def nvme(root: Path, speed: str = "5.0 GT/s PCIe", width: str = "1") -> int:
    controller = root / "sys/devices/platform/axi/1000110000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0"
    put(controller / "current_link_speed", f"{speed}\n")
    put(controller / "current_link_width", f"{width}\n")
    disk = controller / "nvme/nvme0/nvme0n1"
    (disk / "nvme0n1p2").mkdir(parents=True)
    (disk / "device").symlink_to("..")
    (disk.parent / "device").symlink_to("../..")
    return partition(root, disk / "nvme0n1p2", NVME)


def usb_drive(root: Path) -> int:
    port = root / "sys/devices/platform/scb/fd500000.pcie/pci0000:00/0000:01:00.0/usb2/2-1"
    put(port / "speed", "5000\n")
    disk = port / "2-1:1.0/host0/target0:0:0/0:0:0:0/block/sda"
    (disk / "sda2").mkdir(parents=True)
    return partition(root, disk / "sda2", USB)


def partition(root: Path, place: Path, number: int) -> int:
    put(place / "partition", "2\n")
    link = root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(place)
    return number


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
