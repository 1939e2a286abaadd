"""What the planner expects of a Raspberry Pi 4 and 5 on SD, USB and NVMe, from published figures: docs/raspberry-pi.md.

Predictions, not measurements: no board takes part. Memory is that of Python and the llamacpp backend on this machine.
"""

from __future__ import annotations

import argparse
from typing import Any

import common

import edgelm
from edgelm_apps.pi import expect

BUDGETS_MB = {
    "smollm2-135m-instruct": (80, 110, 150, 220),
    "gemma-3-270m": (120, 180, 250, 420),
}
LARGE_MB = (500, 700, 1000, 1400)
NAMES = ("pi4-sd", "pi4-usb-ssd", "pi5-sd", "pi5-nvme", "pi5-nvme-gen3")


CONSTANTS = "Constants"


def constants(device: edgelm.Device) -> dict[str, Any]:
    """Return what a board is taken to do, and where that is from."""
    assert device.processor is not None
    return {
        "board": device.name,
        "what it is": device.about,
        "flash MB/s": common.mb(device.flash_bytes_per_s),
        "a read takes besides, ms": 1000 * device.latency_s,
        "weights for a token, GB/s": device.processor.compute_bytes_per_s / 1e9,
        "weights times tokens of a prompt, GB/s": device.processor.wide_bytes_per_s / 1e9,
        "processor figures from": device.processor.source,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(BUDGETS_MB), help="catalogue names or paths")
    parser.add_argument("--threads", type=int, choices=[4], default=4, help="what the published figures are of")
    args = parser.parse_args()
    backend = expect.usable_backend()
    devices = edgelm.devices()
    report = common.Report("pi_expect", {"what": expect.LABEL, "context": expect.CONTEXT, "backend": backend})
    for name in NAMES:
        report.add(CONSTANTS, **constants(devices[name]))
    for name in args.models:
        path = common.find_model(name)
        sizes = [size * common.MB for size in BUDGETS_MB.get(name, LARGE_MB)]
        for board in NAMES:
            spared = [size for size in sizes if size <= devices[board].memory_bytes]
            for row in expect.expected(path, [board], spared, backend):
                cells = dict(zip(expect.COLUMNS, row.cells(), strict=True))
                report.add(path.name, **cells, figures=[row._asdict()])
    report.finish()


if __name__ == "__main__":
    main()
