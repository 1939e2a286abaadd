"""Plans: never above the budget, every unit somewhere, nothing wasted, and a floor that is really the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_units import matrices

from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo
from edgelm.memory import plan as planning
from edgelm.memory.buffer import PAGE
from edgelm.memory.plan import Demand, Plan, fill, make_plan, spread
from edgelm.memory.predict import Rates, pass_s
from edgelm.memory.stores import span
from edgelm.memory.units import Unit, make_units, smallest_slot
from edgelm.memory.window import runs
from edgelm.sizes import MB

CONTEXT = 512


def demands(fixed: int, per_token: int) -> list[Demand]:
    """Demands that grow with the chunk."""
    return [Demand(fixed, 4096, fixed // 3, chunk, chunk * per_token, chunk * 100, 1000) for chunk in (64, 16, 4, 1)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[TensorInfo], list[Demand], int]:
    """Matrices, demands and a budget that works: from the floor to more than everything."""
    infos = draw(matrices(12))
    given_demands = demands(draw(st.integers(0, 3 * MB)), draw(st.integers(0, 50_000)))
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(infos, given_demands, 1, CONTEXT)
    every_byte = sum(info.n_bytes for info in infos)
    extra = draw(st.floats(0, 1.2)) * (every_byte + given_demands[0].total_bytes - given_demands[-1].total_bytes)
    return infos, given_demands, caught.value.needed_bytes + int(extra)


@pytest.fixture(autouse=True, scope="module")
def _small_slots() -> object:
    """Slots as small as the matrices of these tests."""
    before, planning.MIN_SLOT_BYTES = planning.MIN_SLOT_BYTES, PAGE
    yield
    planning.MIN_SLOT_BYTES = before


@settings(max_examples=150, deadline=None)
@given(cases())
def test_a_plan_keeps_the_budget_and_holds_every_unit(case: tuple[list[TensorInfo], list[Demand], int]) -> None:
    infos, given_demands, budget = case
    plan = make_plan(infos, given_demands, budget, CONTEXT)
    assert plan.planned_bytes <= budget
    assert dict(plan.items())["unused"] == budget - plan.planned_bytes
    assert sum(n_bytes for _, n_bytes in plan.items()) == budget
    assert plan.pass_bytes == sum(info.n_bytes for info in infos)
    assert sorted([*plan.pinned, *plan.streamed]) == list(range(len(plan.units)))
    assert all(plan.units[i].span_bytes <= plan.slot_bytes for i in plan.streamed)
    held = [(part.tensor, part.first_row, part.rows) for run in runs(plan) for part in run.unit.parts]
    for info in infos:
        rows = [row for name, first, n in held if name == info.name for row in range(first, first + n)]
        assert rows == list(range(info.n_rows))
    assert sum(run.unit.span_bytes for run in runs(plan) if run.pinned) <= plan.pinned_bytes
    if plan.streamed:
        assert plan.n_slots >= 2
        assert len(plan.streamed) > plan.n_slots, "slots that could hold all they stream should have pinned it"
        # what is left over is less than a step of rows
        assert budget - plan.planned_bytes < max(first_step(plan.units[i]) for i in plan.streamed) + PAGE
    else:
        assert plan.n_slots == plan.slots_bytes == 0


@settings(max_examples=100, deadline=None)
@given(matrices(), st.integers(0, 10**6), st.integers(0, 50_000), st.booleans())
def test_the_smallest_budget_works_and_a_byte_less_does_not(
    infos: list[TensorInfo], fixed: int, per_token: int, streams: bool
) -> None:
    given_demands = demands(fixed, per_token)
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(infos, given_demands, 1, CONTEXT, streams=streams)
    needed = caught.value.needed_bytes
    assert make_plan(infos, given_demands, needed, CONTEXT, streams=streams).planned_bytes <= needed
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(infos, given_demands, needed - 1, CONTEXT, streams=streams)
    error = caught.value
    assert (error.given_bytes, error.needed_bytes) == (needed - 1, needed)
    assert len(error.items) == 3
    assert [n_bytes for _, n_bytes in error.items] == sorted((n for _, n in error.items), reverse=True)
    smallest = given_demands[-1]
    assert error.items[0][1] >= max(n_bytes for _, n_bytes in smallest.items())
    assert all(name in str(error) for name, _ in error.items)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_backend_that_cannot_stream_gets_all_or_nothing(case: tuple[list[TensorInfo], list[Demand], int]) -> None:
    infos, given_demands, budget = case
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(infos, given_demands, 1, CONTEXT, streams=False)
    budget = max(budget, caught.value.needed_bytes)
    plan = make_plan(infos, given_demands, budget, CONTEXT, streams=False)
    assert plan.streamed == ()
    assert plan.pinned_bytes >= sum(info.n_bytes for info in infos)
    assert plan.planned_bytes <= budget


@settings(max_examples=60, deadline=None)
@given(cases(), st.floats(1e6, 1e10), st.floats(1e6, 1e11))
def test_predicted_speed_lies_between_the_slower_of_flash_and_compute_and_both_in_a_row(
    case: tuple[list[TensorInfo], list[Demand], int], flash: float, compute: float
) -> None:
    infos, given_demands, budget = case
    plan = make_plan(infos, given_demands, budget, CONTEXT, Rates(flash, compute, 0.001))
    alone = 0.001 + plan.pass_bytes / compute, plan.streamed_bytes / flash
    # what computes while it waits for a slot is at most one unit of each kind more
    assert max(alone) * (1 - 1e-9) <= 1 / plan.predicted_decode_tps <= sum(alone) * (1 + 1e-9)
    assert plan.predicted_prefill_tps == 0 or plan.predicted_prefill_tps >= (1 - 1e-9) * plan.predicted_decode_tps
    assert make_plan(infos, given_demands, budget, CONTEXT).predicted_decode_tps == 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 10**6), max_size=60), st.floats(0, 1.5))
def test_spread_fills_the_room_and_never_exceeds_it(sizes: list[int], share: float) -> None:
    room = int(share * sum(sizes))
    kept = spread(sizes, room)
    used = sum(sizes[i] for i in kept)
    assert used <= room
    left = [size for i, size in enumerate(sizes) if i not in kept]
    assert not left or min(left) > room - used


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 80), st.floats(0.05, 0.95))
def test_spread_is_even(n: int, share: float) -> None:
    """Of equal units every stretch of the pass keeps its share, give or take two."""
    kept = spread([1000] * n, int(share * n * 1000))
    assume(kept)
    for start in range(n):
        for stop in range(start + 1, n + 1):
            in_stretch = sum(start <= i < stop for i in kept)
            assert abs(in_stretch - (stop - start) * len(kept) / n) < 2 + 1e-9


def test_a_wide_chunk_is_taken_when_it_costs_little() -> None:
    infos = [TensorInfo(f"m{i}", TensorType.F32, (256, 640), 0, i * 655_360, 655_360) for i in range(20)]
    chosen = [
        make_plan(infos, demands(MB, 2000), budget, CONTEXT).chunk for budget in (1_500_000, 2_000_000, 5_000_000)
    ]
    assert chosen == sorted(chosen)
    assert chosen[-1] == 64


def test_a_plan_above_its_budget_cannot_be_made() -> None:
    infos = [TensorInfo("m", TensorType.F32, (256, 640), 0, 0, 655_360)]
    plan = make_plan(infos, demands(MB, 10), 10 * MB, CONTEXT)
    with pytest.raises(ConfigError, match="exceeds its budget"):
        replace(plan, budget_bytes=plan.planned_bytes - 1)


def test_a_plan_prints_every_byte() -> None:
    infos = [TensorInfo(f"m{i}", TensorType.F32, (256, 640), 0, i * 655_360, 655_360) for i in range(20)]
    for budget in (2_000_000, 8_000_000, 20_000_000):
        plan: Plan = make_plan(infos, demands(MB, 100), budget, CONTEXT, Rates(1e8, 1e9))
        text = str(plan)
        assert all(name in text for name, _ in plan.items())
        assert ("nothing is streamed" in text) == (not plan.streamed)
        assert "-" not in text.split("of weights:")[1].split("%")[0]
        values = plan.as_dict()
        assert sum(values["items"].values()) == budget
        assert values["units_pinned"] == len(plan.pinned)


def test_less_than_two_slots_of_weights_stay_resident() -> None:
    """The smallest budget of a very small model is that of its weights, not that of two slots."""
    infos = [TensorInfo("m", TensorType.F32, (256, 20), 0, 0, 20_480)]
    assert 2 * smallest_slot(infos) > 20_480
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(infos, demands(0, 0), 1, CONTEXT)
    plan = make_plan(infos, demands(0, 0), caught.value.needed_bytes, CONTEXT)
    assert plan.streamed == ()


def first_step(unit: Unit) -> int:
    """Return the memory of the rows that a unit begins with and that stay together."""
    return span(PAGE - 1, min(unit.parts[0].step_bytes, unit.parts[0].n_bytes))


def seconds_of(costs: Sequence[tuple[int, float]], pinned: frozenset[int], rate: float, n_slots: int) -> float:
    reads = [0.0 if i in pinned else size / rate for i, (size, _) in enumerate(costs)]
    return pass_s([compute for _, compute in costs], reads, n_slots)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(40, 100), min_size=5, max_size=11),
    st.floats(0.15, 0.9),
    st.floats(0.1, 10.0),
    st.integers(2, 4),
)
def test_the_choice_is_as_good_as_the_best_of_all_choices(
    sizes: list[int], share: float, ratio: float, n_slots: int
) -> None:
    """Every subset that fits is tried. `ratio`: how long reading takes for each second of computing."""
    room = int(share * sum(sizes))
    costs = [(size, size * 1.0) for size in sizes]
    chosen = seconds_of(costs, spread(sizes, room), 1 / ratio, n_slots)
    best = min(
        seconds_of(costs, frozenset(some), 1 / ratio, n_slots)
        for n in range(len(sizes) + 1)
        for some in combinations(range(len(sizes)), n)
        if sum(sizes[i] for i in some) <= room
    )
    # units are not cut here, so the best subset may fill the room better by a part of one unit
    assert chosen <= best + max(sizes) * max(ratio, 1.0)


@settings(max_examples=100, deadline=None)
@given(matrices(12), st.floats(0.05, 0.9))
def test_less_than_a_step_of_rows_is_left_over(infos: list[TensorInfo], share: float) -> None:
    units = make_units(infos, 4 * smallest_slot(infos))
    room = int(share * sum(unit.span_bytes for unit in units))
    cut, pinned = fill(units, room)
    used = sum(cut[i].span_bytes for i in pinned)
    steps = [first_step(unit) for i, unit in enumerate(cut) if i not in pinned]
    assert used <= room
    assert not steps or room - used < max(steps) + PAGE
    assert sum(unit.n_bytes for unit in cut) == sum(info.n_bytes for info in infos)


def test_a_pass_waits_for_flash_only_as_much_as_it_must() -> None:
    assert pass_s([1.0, 2.0], [0.0, 0.0], 0) == 3.0
    assert pass_s([1.0] * 8, [0.5] * 8, 2) == pytest.approx(8.0)  # hidden behind computing
    assert pass_s([0.25] * 8, [1.0] * 8, 2) == pytest.approx(8.0)  # as fast as the flash
    # one slot cannot overlap: it is read again only once it was used
    assert pass_s([1.0] * 8, [1.0] * 8, 1) == pytest.approx(16.0)
    # all that streams in a row: two slots hide two of the reads behind what stays
    bunched = pass_s([1.0] * 8, [1.0] * 4 + [0.0] * 4, 2)
    assert bunched >= pass_s([1.0] * 8, [1.0, 0.0] * 4, 2) == pytest.approx(8.0)


def test_a_plan_that_streams_from_a_flash_nobody_measured_predicts_nothing() -> None:
    infos = [TensorInfo(f"m{i}", TensorType.F32, (256, 640), 0, i * 655_360, 655_360) for i in range(20)]
    plan = make_plan(infos, demands(MB, 100), 8 * MB, CONTEXT, Rates(0.0, 1e9))
    assert plan.streamed
    assert plan.predicted_decode_tps == plan.predicted_ttft_s(100) == 0.0
