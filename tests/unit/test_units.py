"""Units: every row of every matrix exactly once, in pass order, in pieces that a slot holds."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.model import TensorInfo
from edgelm.memory.buffer import PAGE
from edgelm.memory.stores import span
from edgelm.memory.units import MAX_UNITS, Unit, constants, make_unit, make_units, merge, part_of, smallest_slot

TYPES = (TensorType.F32, TensorType.F16, TensorType.Q4_0, TensorType.Q8_0, TensorType.Q6_K)


@st.composite
def matrices(draw: st.DrawFn, most: int = 8) -> list[TensorInfo]:
    """Matrices in pass order; in the file they lie in another order, with gaps, perhaps in two files."""
    shapes = draw(
        st.lists(st.tuples(st.sampled_from(TYPES), st.integers(1, 8), st.integers(2, 900)), min_size=1, max_size=most)
    )
    ends = [draw(st.integers(0, 9000)), 0]
    infos: list[TensorInfo] = []
    for i in draw(st.permutations(range(len(shapes)))):
        kind, width, rows = shapes[i]
        file = draw(st.integers(0, 1))
        offset = ends[file] + draw(st.sampled_from([0, 1, 32, 4095, 4096, 70000]))
        n_bytes = rows * row_bytes(kind, width * 256)
        row_step = draw(st.sampled_from([32, 32, 64, 512]))
        infos.append(TensorInfo(f"m{i}", kind, (width * 256, rows), file, offset, n_bytes, row_step))
        ends[file] = offset + n_bytes
    return sorted(infos, key=lambda info: info.name)


def check_layout(unit: Unit) -> None:
    """Every part lies in the unit's memory where a read of it puts it, and no two reads overlap there."""
    taken = sorted((read.at, read.at + span(read.offset, read.n_bytes)) for read in unit.reads)
    assert all(read.at % PAGE == 0 for read in unit.reads)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert unit.span_bytes == sum(stop - start for start, stop in taken) == taken[-1][1]
    for part in unit.parts:
        at = unit.offset_of(part)
        assert any(
            read.file == part.file and at - (read.at + read.offset % PAGE) == part.offset - read.offset
            for read in unit.reads
        )
        assert at % PAGE == part.offset % PAGE
        assert at + part.n_bytes <= unit.span_bytes
    assert unit.n_bytes == sum(part.n_bytes for part in unit.parts)


@settings(max_examples=150, deadline=None)
@given(matrices(), st.floats(1, 40))
def test_units_hold_every_row_once_in_pass_order(infos: list[TensorInfo], factor: float) -> None:
    slot_bytes = int(smallest_slot(infos) * factor)
    units = make_units(infos, slot_bytes)
    rows: dict[str, list[int]] = {info.name: [] for info in infos}
    order: list[str] = []
    for unit in units:
        check_layout(unit)
        assert unit.span_bytes <= slot_bytes
        for part in unit.parts:
            info = infos[[info.name for info in infos].index(part.tensor)]
            assert part == part_of(info, part.first_row, part.rows)
            assert part.first_row % info.row_step == 0
            assert part.rows % info.row_step == 0 or part.first_row + part.rows == info.n_rows
            rows[part.tensor] += range(part.first_row, part.first_row + part.rows)
            order.append(part.tensor)
    assert all(rows[info.name] == list(range(info.n_rows)) for info in infos)
    assert list(dict.fromkeys(order)) == [info.name for info in infos]
    assert [name for i, name in enumerate(order) if order[i - 1 : i] != [name]] == [info.name for info in infos]


@settings(max_examples=100, deadline=None)
@given(matrices(), st.floats(1, 10), st.data())
def test_merged_neighbours_need_no_more_memory_and_are_whole_again(
    infos: list[TensorInfo], factor: float, data: st.DataObject
) -> None:
    units = make_units(infos, int(smallest_slot(infos) * factor))
    start = data.draw(st.integers(0, len(units) - 1))
    some = units[start : data.draw(st.integers(start + 1, len(units)))]
    merged = merge(some)
    check_layout(merged)
    assert merged.span_bytes <= sum(unit.span_bytes for unit in some)
    assert merged.n_bytes == sum(unit.n_bytes for unit in some)
    assert [part.tensor for part in merged.parts] == list(
        dict.fromkeys(part.tensor for unit in some for part in unit.parts)
    )


def test_pieces_of_a_matrix_are_of_equal_size() -> None:
    info = TensorInfo("m", TensorType.F32, (256, 1000), 0, 100, 1000 * 1024)
    units = make_units([info], 400_000)
    assert [part.rows for unit in units for part in unit.parts] == [352, 352, 296]


def test_parts_that_touch_are_one_read_and_distant_ones_are_not() -> None:
    near = [TensorInfo(f"m{i}", TensorType.F32, (256, 8), 0, i * 8200, 8192) for i in range(3)]
    far = TensorInfo("far", TensorType.F32, (256, 8), 0, 90_000, 8192)
    other = TensorInfo("other", TensorType.F32, (256, 8), 1, 16_392, 8192)
    unit = make_unit(map(part_of, [near[1], far, near[0], other, near[2]]))
    assert [(read.file, read.offset, read.n_bytes) for read in unit.reads] == [
        (0, 0, 2 * 8200 + 8192), (0, 90_000, 8192), (1, 16_392, 8192),
    ]  # fmt: skip
    assert [part.tensor for part in unit.parts] == ["m1", "far", "m0", "other", "m2"]


def test_constants_are_the_vectors_only() -> None:
    infos = {
        info.name: info
        for info in (
            TensorInfo("norm", TensorType.F32, (64,), 0, 0, 256),
            TensorInfo("bias", TensorType.F32, (32,), 0, 9000, 128),
            TensorInfo("matrix", TensorType.F32, (64, 2), 0, 256, 512),
        )
    }
    unit = constants(infos, infos)
    assert [part.tensor for part in unit.parts] == ["norm", "bias"]
    check_layout(unit)


def test_a_large_model_is_not_cut_into_crumbs() -> None:
    """Rows are small, and thousands of units would take more memory than the slots that they spare."""
    infos = [TensorInfo(f"m{i}", TensorType.F32, (64, 300_000), 0, i * 76_800_000, 76_800_000) for i in range(10)]
    units = make_units(infos, smallest_slot(infos))
    assert 900 < len(units) <= MAX_UNITS + 2 * len(infos)
