"""Plans: never above the budget, every unit somewhere, nothing wasted, and a floor that is really the floor."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_units import matrices

from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo
from edgelm.memory import plan as planning
from edgelm.memory.buffer import PAGE
from edgelm.memory.plan import Demand, Plan, Rates, make_plan, spread
from edgelm.memory.units import smallest_slot
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
        # what is left over would not hold any unit that streams
        assert budget - plan.planned_bytes < min(plan.units[i].span_bytes for i in plan.streamed)
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
def test_predicted_speed_is_the_slower_of_flash_and_compute(
    case: tuple[list[TensorInfo], list[Demand], int], flash: float, compute: float
) -> None:
    infos, given_demands, budget = case
    plan = make_plan(infos, given_demands, budget, CONTEXT, Rates(flash, compute, 0.001))
    seconds = max(0.001 + plan.pass_bytes / compute, plan.streamed_bytes / flash)
    assert plan.predicted_decode_tps == pytest.approx(1 / seconds)
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
