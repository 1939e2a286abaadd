"""The faster way wins, the other is tried now and then, and what is decided once is not for ever."""

from __future__ import annotations

import pytest

from edgelm.engine.pace import ALARMS, CROWDED, FIRST_REST, LAST_REST, LAST_TRIAL, Crowd, Pace


def walk(pace: Pace, few_s: float, all_s: float, n_passes: int) -> list[int]:
    """Return the threads of passes that take as long as given."""
    chosen = []
    for _ in range(n_passes):
        n_threads = pace.threads(1)
        pace.passed(1, few_s if n_threads == 1 else all_s)
        chosen.append(n_threads)
    return chosen


@pytest.mark.parametrize(
    ("few_s", "all_s", "n_threads"),
    [(2.0, 1.0, 2), (2.0, 1.9, 2), (2.0, 2.0, 1), (2.0, 1.97, 1), (1.0, 3.0, 1)],
)
def test_the_faster_way_is_kept_and_fewer_threads_where_it_is_all_the_same(
    few_s: float, all_s: float, n_threads: int
) -> None:
    chosen = walk(Pace(2, True), few_s, all_s, 400)
    assert chosen[3:].count(n_threads) >= 0.97 * len(chosen[3:])


def test_a_flash_that_slows_down_is_noticed() -> None:
    pace = Pace(2, True)
    for few_s, all_s, n_threads in ((2.0, 1.0, 2), (5.0, 5.0, 1), (2.0, 1.0, 2)):
        last = walk(pace, few_s, all_s, 2 * LAST_TRIAL)[-12:]
        assert last.count(n_threads) >= 11


def test_wide_passes_and_resident_models_use_every_thread() -> None:
    assert Pace(4, True).threads(64) == 4
    assert Pace(4, True).threads(2) == 3
    assert walk(Pace(1, True), 1.0, 1.0, 40) == [1] * 40
    assert walk(Pace(2, False), 1.0, 1.0, 40) == [2] * 40


def test_passes_of_guesses_go_the_way_that_passes_of_one_token_went() -> None:
    for few_s, all_s, n_threads in ((1.0, 3.0, 1), (3.0, 1.0, 2)):
        pace = Pace(2, True)
        walk(pace, few_s, all_s, 40)
        assert [pace.threads(n) for n in (2, 8, 32)] == [n_threads] * 3


def test_beside_the_reads_of_another_model_nothing_is_tried() -> None:
    assert walk(Pace(2, True, tries=False), 3.0, 1.0, 400) == [1] * 400
    assert walk(Pace(2, False, tries=False), 3.0, 1.0, 4) == [2] * 4


def test_one_thread_computes_alone_while_others_want_the_cores() -> None:
    pace = Pace(2, False)
    assert walk(pace, 1.0, 1.0, 8) == [2] * 8
    assert walk(pace, 2.0, 3 * CROWDED, ALARMS) == [2] * ALARMS
    assert walk(pace, 2.0, 1.0, FIRST_REST + 8) == [1] * FIRST_REST + [2] * 8


def test_a_crowd_that_stays_is_looked_for_ever_more_seldom() -> None:
    pace = Pace(2, False)
    walk(pace, 1.0, 1.0, 4)
    chosen = walk(pace, 2.0, 3 * CROWDED, 4000)
    assert chosen.count(2) < 0.02 * len(chosen)
    assert walk(pace, 2.0, 1.0, LAST_REST + 8)[-8:] == [2] * 8


def test_passes_that_a_long_context_makes_slow_become_usual() -> None:
    pace = Pace(2, False)
    walk(pace, 1.6, 1.0, 8)
    chosen = walk(pace, 16.0, 10.0, 200)
    assert chosen == [2] * ALARMS + [1] * FIRST_REST + [2] * (200 - ALARMS - FIRST_REST)


def test_passes_of_each_width_are_compared_with_their_like() -> None:
    crowd = Crowd()
    for _ in range(8):
        for n_tokens, seconds in ((1, 1.0), (8, CROWDED), (64, 9.0), (512, 70.0)):
            crowd.passed(n_tokens, seconds)
    assert not crowd.there
    for _ in range(ALARMS):
        crowd.passed(64, 9.0 * 2 * CROWDED)
    assert crowd.there
