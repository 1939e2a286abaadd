"""The allocator's settings, on a double and on this process' own C library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edgelm.memory.platform import trim, tune_allocator

RETURNED = """
from edgelm.memory.platform import current_platform, trim, tune_allocator
tuned = tune_allocator()
rss = current_platform().rss_bytes
before = rss()
blocks = [b"x" * 200_000 for _ in range(200)]
held = rss() - before
del blocks
trim()
print(tuned, held, rss() - before)
"""


class FakeLibrary:
    def __init__(self, accepts: bool = True) -> None:
        self.options: dict[int, int] = {}
        self.accepts = accepts

    def mallopt(self, option: int, value: int) -> int:
        self.options[option] = value
        return int(self.accepts)

    def malloc_trim(self, pad: int) -> int:
        return int(self.accepts and pad == 0)


def test_thresholds_and_arenas_are_set() -> None:
    library = FakeLibrary()
    assert tune_allocator(library)
    assert library.options == {-3: 64 << 10, -1: 128 << 10, -8: 2}
    assert trim(library)


def test_a_refusal_is_reported() -> None:
    assert not tune_allocator(FakeLibrary(accepts=False))
    assert not trim(FakeLibrary(accepts=False))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_blocks_leave_the_process() -> None:
    # a process of its own: the settings last as long as the process
    result = subprocess.run([sys.executable, "-c", RETURNED], capture_output=True, text=True, check=True)
    tuned, held, left = result.stdout.split()
    if tuned == "False":
        pytest.skip("not glibc")
    assert int(held) > 35_000_000
    assert int(left) < 2_000_000
