"""The benchmarks start, and their measuring of limits is right; figures are not made here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
SCRIPTS = (
    "tokens", "speed", "startup", "memory", "streaming", "big_streaming", "neurons", "flash", "pack", "entropy",
    "neighbours", "predict", "live_budget", "verify", "approximate", "aarch64", "pi_expect",
)  # fmt: skip
ALLOCATE = "import sys; block = bytearray(int(sys.argv[1])); block[::4096] = b'x' * len(block[::4096]); print('done')"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_start(script: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH / f"{script}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--threads" in done.stdout


@pytest.mark.device
def test_a_limit_that_is_kept_is_not_felt(within_memory: Callable[..., Any]) -> None:
    inside = within_memory("200MB", [sys.executable, "-c", ALLOCATE, "50000000"])
    assert (inside.exit_code, inside.stdout) == (0, "done\n")
    assert (inside.limit_hits, inside.oom_kills) == (0, 0)
    assert 50_000_000 < inside.peak_bytes <= inside.limit_bytes


@pytest.mark.device
def test_a_limit_that_is_broken_is_seen(within_memory: Callable[..., Any]) -> None:
    inside = within_memory("60MB", [sys.executable, "-c", ALLOCATE, "150000000"])
    assert inside.exit_code != 0
    assert inside.limit_hits > 0
    assert inside.oom_kills == 1


@pytest.mark.device
def test_a_file_can_be_made_cold(within_memory: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"\1" * 40_000_000)
    if os.major(file.stat().st_dev) == 0:
        pytest.skip("the temporary folder is not on a disk: what lies in memory cannot be made cold")
    read = "import sys; print(len(open(sys.argv[1], 'rb').read()))"
    inside = within_memory("300MB", [sys.executable, "-c", read, str(file)], evict=file)
    assert inside.stdout == "40000000\n"
    assert inside.peak_bytes > 80_000_000  # what was read, and the page cache of the file that it was read from
