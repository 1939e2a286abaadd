"""All threads where computing is the slower, one fewer where flash is, and no flapping between them."""

from __future__ import annotations

import pytest

from edgelm.engine.pace import Pace


def settle(few_s: float, all_s: float, read_s: float, n_passes: int = 40) -> list[int]:
    """Return the threads of passes that compute as long as given, and read for `read_s` meanwhile."""
    pace, chosen = Pace(2, True), []
    for _ in range(n_passes):
        n_threads = pace.threads(1)
        compute_s = few_s if n_threads == 1 else all_s
        seconds = max(compute_s, read_s)
        pace.passed(1, seconds, seconds - compute_s)
        chosen.append(n_threads)
    return chosen


@pytest.mark.parametrize(("read_s", "n_threads"), [(0.5, 2), (1.2, 2), (1.9, 2), (2.5, 1), (9.0, 1)])
def test_the_slower_of_flash_and_compute_decides(read_s: float, n_threads: int) -> None:
    assert set(settle(2.0, 1.0, read_s)[2:]) == {n_threads}


def test_a_flash_that_slows_down_is_noticed() -> None:
    pace = Pace(4, True)
    for seconds, waited_s, n_threads in ((2.0, 0.0, 3), (1.6, 0.0, 4), (1.6, 0.1, 4), (5.0, 3.5, 4), (5.0, 3.0, 3)):
        assert pace.threads(1) == n_threads
        pace.passed(1, seconds, waited_s)
    assert pace.threads(1) == 3


def test_wide_passes_and_resident_models_use_every_thread() -> None:
    assert Pace(4, True).threads(8) == 4
    assert Pace(4, True).threads(2) == 3
    assert Pace(4, False).threads(1) == 4
    assert Pace(1, True).threads(1) == 1
