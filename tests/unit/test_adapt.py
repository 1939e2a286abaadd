"""When memory is given back and taken again: the policy against simulated devices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.memory.adapt import CALM, PATIENCE, STEPS, TARGET, Adapter, margin_bytes
from edgelm.memory.platform.base import Pressure
from edgelm.sizes import GB, MB

ASKED, FLOOR = 300 * MB, 100 * MB
TOTAL = GB
MARGIN = margin_bytes(TOTAL)


class Device:
    """A device on which others use `others` bytes and the model what its plan uses: `resident` at the most."""

    def __init__(self, total: int, asked: int, floor: int, resident: int, others: int) -> None:
        self.total, self.asked, self.floor, self.resident, self.others = total, asked, floor, resident, others
        self.budget, self.adapter, self.seen = asked, Adapter(), [asked]
        self.signals: dict[str, float] = {}

    @property
    def used(self) -> int:
        return min(self.budget, self.resident)

    @property
    def available(self) -> int:
        return max(self.total - self.others - self.used, 0)

    def run(self, n_samples: int, noise: int = 0) -> list[int]:
        """Let samples pass; return the budgets after each."""
        for i in range(n_samples):
            available = max(self.available + (noise if i % 2 else -noise), 0)
            sample = Pressure(self.total, available, **self.signals)  # type: ignore[arg-type]
            wanted = self.adapter.next_budget(self.asked, self.floor, self.budget, self.used, sample)
            if wanted is not None:
                assert wanted != self.budget
                self.budget = wanted
            self.seen.append(self.budget)
        return self.seen[-n_samples:]


@st.composite
def devices(draw: st.DrawFn) -> Device:
    total = draw(st.integers(50 * MB, 16 * GB))
    floor = draw(st.integers(1, total))
    asked = draw(st.integers(floor, 2 * total))
    return Device(total, asked, floor, draw(st.integers(floor, 2 * total)), draw(st.integers(0, total)))


def settle(device: Device) -> list[int]:
    return device.run((STEPS + 2) * CALM * 4)


@given(devices())
def test_under_constant_conditions_it_settles_within_its_bounds(device: Device) -> None:
    budgets = settle(device)
    assert all(device.floor <= budget <= device.asked for budget in budgets)
    assert len(set(budgets[-CALM * 4 :])) == 1, "it settles"
    downs = [i for i in range(1, len(budgets)) if budgets[i] < budgets[i - 1]]
    ups = [i for i in range(1, len(budgets)) if budgets[i] > budgets[i - 1]]
    assert not (ups and downs), "nothing changed, so nothing may swing"


@given(devices())
def test_settled_it_leaves_the_margin_or_has_nothing_to_give(device: Device) -> None:
    settle(device)
    assert device.available >= margin_bytes(device.total) or device.budget == device.floor


@given(devices(), st.integers(0, 16 * GB))
def test_what_was_given_back_is_taken_again(device: Device, others: int) -> None:
    device.others = others
    device.run(CALM + 5)
    device.others = 0
    settle(device)
    room = device.total - 3 * margin_bytes(device.total)
    assert device.budget == device.asked or device.used >= min(room, device.resident)


@given(devices(), st.floats(0, 0.45))
def test_noise_below_half_a_margin_moves_nothing_that_is_settled(device: Device, share: float) -> None:
    settle(device)
    before = device.budget
    if before == device.floor < device.asked or device.available < TARGET * margin_bytes(device.total):
        return
    assert set(device.run(300, noise=int(share * margin_bytes(device.total) / 2))) <= {before, device.asked}


@given(devices(), st.lists(st.tuples(st.integers(0, 16 * GB), st.integers(1, 40)), max_size=20))
def test_no_history_leads_out_of_the_bounds(device: Device, history: list[tuple[int, int]]) -> None:
    for others, n_samples in history:
        device.others = others
        assert all(device.floor <= budget <= device.asked for budget in device.run(n_samples))


def device(others: int = 0, total: int = TOTAL) -> Device:
    return Device(total, ASKED, FLOOR, ASKED, others)


def test_what_is_missing_goes_at_once() -> None:
    one = device(others=TOTAL - ASKED - MARGIN + 1)
    assert one.run(1) == [ASKED - int(MARGIN * TARGET) + MARGIN - 1]
    assert device(others=TOTAL).run(3) == [204 * MB, 108 * MB, FLOOR]


def test_a_neighbour_that_grows_fast_is_met_half_way() -> None:
    one = device(others=TOTAL - ASKED - 3 * MARGIN)
    one.run(1)
    one.others += MARGIN
    assert one.run(1) == [ASKED], "two margins are free, and one will be"
    one.others += MARGIN - 1
    assert one.run(1) == [ASKED - int(MARGIN * TARGET) + 2]


def test_a_plan_that_leaves_a_part_unused_gives_of_what_it_uses() -> None:
    one = Device(TOTAL, ASKED, FLOOR, 200 * MB, TOTAL - 200 * MB)
    assert one.run(1) == [200 * MB - int(MARGIN * TARGET)]


def test_memory_is_taken_in_steps_after_calm() -> None:
    one = device(others=TOTAL)
    one.run(3)
    one.others = 0
    step = (ASKED - FLOOR) // STEPS
    assert one.run(CALM - 1)[-1] == FLOOR
    assert one.run(1)[-1] == FLOOR + step
    assert one.run(CALM - 1)[-1] == FLOOR + step
    assert one.run(CALM * (STEPS - 1) + 1)[-1] == ASKED


def test_a_restless_neighbour_makes_it_patient() -> None:
    one = device()
    for _ in range(60):
        one.others = TOTAL
        one.run(1)
        one.others = 0
        one.run(CALM + 1)
    ups = sum(later > before for before, later in zip(one.seen, one.seen[1:], strict=False))
    assert 1 <= ups <= 5, "without a memory of failures it would be 60"


@pytest.mark.parametrize("signal", [{"stalled": 0.2}, {"level": 1}])
def test_a_signal_asks_for_a_step_and_then_for_patience(signal: dict[str, float]) -> None:
    one = device(others=TOTAL - ASKED - 2 * MARGIN)
    one.signals = signal
    step = (ASKED - FLOOR) // STEPS
    assert one.run(PATIENCE) == [ASKED - step] * PATIENCE
    assert one.run(1) == [ASKED - 2 * step]


def test_a_critical_level_takes_all_but_the_floor() -> None:
    one = device()
    one.signals = {"level": 2}
    assert one.run(1) == [FLOOR]


def test_met_limits_count_when_they_grow() -> None:
    one = device(others=TOTAL - ASKED - 2 * MARGIN)
    one.signals = {"limit_hits": 50}
    assert one.run(20)[-1] == ASKED, "hits of the time before"
    one.signals = {"limit_hits": 51}
    assert one.run(2)[-1] == ASKED - (ASKED - FLOOR) // STEPS


def test_with_much_memory_free_the_stalls_are_those_of_others() -> None:
    one = device()
    one.signals = {"stalled": 0.9}
    assert one.run(100)[-1] == ASKED


@pytest.mark.parametrize(
    ("total", "margin"), [(300 * MB, 30 * MB), (GB, 64 * MB), (4 * GB, 200 * MB), (64 * GB, 500 * MB)]
)
def test_margins(total: int, margin: int) -> None:
    assert margin_bytes(total) == margin
