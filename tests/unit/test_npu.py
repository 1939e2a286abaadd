"""The simulated NPU: 8-bit numbers, outliers, stages and work, fixed shapes, and that it says what it is everywhere."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm.engine.backend import CacheGroup, PassShape
from edgelm.engine.choosing import Asked, choose
from edgelm.engine.ir import Segment
from edgelm.engine.lanes import Lanes
from edgelm.files.gguf import open_model
from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm.testing.recording import Recording
from edgelm_npu.cost import predict
from edgelm_npu.devices import DEVICES
from edgelm_npu.layout import TILE, pack_rows, row_bytes
from edgelm_npu.lowering import CHUNK, WIDTHS, padded, stages, work_of
from edgelm_npu.numbers import EXACT_COLUMNS, LIMIT, Floats, Outliers, integer_product, n_outliers, quantize
from edgelm_npu.products import LANE_FLOATS, Product, Space

PROMPT = "one two three four five six"


def block(n: int) -> tuple[Segment, PassShape]:
    recording = Recording(n, capacity=512, length=512)
    return recording.segment([recording.ops.select(recording.block())])


@given(st.integers(1, 6), st.sampled_from([1, 3, 64]), st.integers(0, 2**32 - 1))
def test_codes_are_within_half_a_step(rows: int, width: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, width), np.float32) * np.float32(1e3)
    codes, scales = quantize(x)
    assert np.abs(codes.astype(int)).max() <= LIMIT
    assert (np.abs(codes * scales - x) <= scales * 0.5001).all()


def test_what_is_no_number_becomes_zero() -> None:
    codes, scales = quantize(np.array([[np.nan, np.inf, -np.inf, 2.0], [0, 0, 0, 0]], np.float32))
    assert codes.tolist() == [[0, 0, 0, LIMIT], [0, 0, 0, 0]]
    assert np.isfinite(scales).all()


def test_outliers_are_the_largest_of_each_row() -> None:
    x = np.random.default_rng(0).standard_normal((5, 64), np.float32)
    for row, channels in enumerate([(3, 9), (0, 1), (62, 63), (7, 8), (20, 40)]):
        x[row, channels] = (500, -700)
    outliers = Outliers.of(x)
    assert outliers.channels.shape == (5, n_outliers(64))
    assert {3, 9} <= set(outliers.channels[0].tolist())
    assert {62, 63} <= set(outliers.channels[2].tolist())
    assert (outliers.steps < 4 / LIMIT).all(), "outliers do not coarsen the rest"


def test_both_parts_make_up_the_activation() -> None:
    """Codes times steps, and outliers in fixed point, are the numbers that went in."""
    x = np.random.default_rng(1).standard_normal((7, 96), np.float32) ** 5
    outliers = Outliers.of(x)
    codes = np.full((16, 96), np.nan, np.float32)
    outliers.codes(x, codes)
    assert (codes[7:] == 0).all(), "the program's other rows are filled up"
    assert np.abs(codes).max() <= LIMIT
    channels, numbers, steps = outliers.fixed_point(x)
    whole = codes[:7].astype(np.float64) * outliers.steps
    whole[:, channels] += numbers * steps
    assert (np.abs(whole - x) <= outliers.steps * 0.51).all()
    exact = np.take_along_axis(x, outliers.channels, axis=1)
    assert np.allclose(np.take_along_axis(whole, outliers.channels, axis=1), exact, rtol=1e-5, atol=steps.max())


@pytest.mark.parametrize("width", [64, EXACT_COLUMNS, EXACT_COLUMNS + 1, 3000])
def test_integer_products_are_exact(width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.choice([-LIMIT, LIMIT], (3, width)).astype(np.float32)  # the largest sums that can be
    weights = rng.choice([-LIMIT, LIMIT], (2, 32, width)).astype(np.float32)
    weights[0, 0] = x[0]
    out, partial = np.empty((2, 2, 3, 32), np.float32)
    integer_product(x, weights, out, partial)
    expected = x.astype(np.int64) @ weights.astype(np.int64).transpose(0, 2, 1)
    assert expected.max() == LIMIT * LIMIT * width
    assert np.array_equal(out, expected.astype(np.float32))


@pytest.mark.parametrize("n", [1, 2, 16, 17, CHUNK, CHUNK + 1, 300])
def test_work_covers_every_row_once_in_shapes_that_exist(n: int) -> None:
    segment, _ = block(n)
    parts = stages(segment)
    work = work_of(parts, n, 1)
    for i, part in enumerate(parts):
        mine = [one for one in work if one.stage == i]
        if part.kind == "npu":
            assert all(padded(one.rows) in WIDTHS and padded(one.rows) >= one.rows for one in mine)
            assert sorted(one.part for one in mine) == ["npu"] * (len(mine) // 2) + ["outliers"] * (len(mine) // 2)
        rows = sum(one.rows for one in mine if one.part != "outliers")
        assert rows == (1 if part.per == "output" else n)
    assert all(before < i for i, one in enumerate(work) for before in one.after)


def test_chunks_attend_in_turn_and_a_select_waits_for_all() -> None:
    segment, _ = block(3 * CHUNK)
    parts = stages(segment)
    work = work_of(parts, 3 * CHUNK, 1)
    attend = next(i for i, part in enumerate(parts) if part.in_turn)
    places = [i for i, one in enumerate(work) if one.stage == attend]
    assert all(before in work[after].after for before, after in pairwise(places))
    select = next(one for one in work if parts[one.stage].kind == "select")
    assert {work[i].chunk for i in select.after} == {0, 1, 2}


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_predictions_are_possible(device) -> None:
    segment, shape = block(512)
    found = predict(segment, shape, device)
    assert max(found.npu_s, found.cpu_s) <= found.seconds <= found.in_order_s
    one = predict(segment, PassShape(1, 1, (CacheGroup(512, 512),)), device)
    assert 0 < one.seconds < found.seconds


@pytest.mark.parametrize("width", [64, 2100])
def test_a_token_means_the_same_whatever_is_computed_with_it(width: int) -> None:
    """Rows of a chunk share neither scales nor outliers, and sums are exact: so a prompt may be cut anywhere."""
    rng = np.random.default_rng(width)
    x, outputs, lanes = rng.standard_normal((100, width), np.float32) ** 3, 75, Lanes(1)
    weights = rng.standard_normal((outputs, width), np.float32)
    raw = np.zeros(outputs * row_bytes(width), np.uint8)
    for first in range(0, outputs, TILE):
        pack_rows(weights[first : first + TILE], raw[first * row_bytes(width) : (first + TILE) * row_bytes(width)])
    space = Space(CHUNK * width, max(LANE_FLOATS, 2 * TILE * (width + CHUNK)), 1)
    work = np.empty(space.n_bytes // 4, np.float32)

    def multiply(rows: Floats, first: str) -> Floats:
        out = np.full((len(rows), outputs), np.nan, np.float32)
        product = Product(rows, Outliers.of(rows), out, raw, space, work, lanes)
        steps = [product.on_the_npu, product.of_outliers]
        for i, step in enumerate(steps if first == "npu" else steps[::-1]):
            step(i > 0)
        return out

    whole = multiply(x, "npu")
    expected = x.astype(np.float64) @ weights.T.astype(np.float64)
    assert np.square(whole - expected).sum() / np.square(expected).sum() < 5e-4
    assert np.array_equal(whole, multiply(x, "outliers")), "whichever part comes first"
    for n in (1, 2, 16, 17, 99):
        assert np.array_equal(multiply(x[:n], "npu"), whole[:n])
    lanes.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama")


@pytest.mark.parametrize("backend", ["npu", "npu+numpy"])
def test_it_says_that_it_is_simulated(tiny: Path, backend: str) -> None:
    said: list[str] = []
    with edgelm.load(tiny, backend=backend, memory="1GB", threads=1, context=64, notice=said.append) as model:
        assert model.backend == backend
        assert model.plan.simulated == "npu"
        assert model.plan.as_dict()["simulated"] == "npu"
        assert "simulated: npu" in str(model.plan)
        assert any("simulated NPU" in note for note in model.notes)
        assert any("8-bit weights" in note for note in model.notes)
        (*_, last) = model.stream(PROMPT, max_tokens=2)
        assert (last.usage.backend, last.usage.simulated) == (backend, "npu")
        assert (model.plan.prompts is not None) == ("+" in backend)
    assert any("preparing tiny.gguf for the npu backend" in sentence for sentence in said)


def test_the_command_line_says_so_too(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm_apps.cli import main

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    options = ["--backend", "npu+numpy", "--memory", "1GB", "--threads", "1", "--context", "64"]
    assert main(["run", str(tiny), PROMPT, "--raw", "--max-tokens", "2", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["backend"], found["simulated"]) == ("npu+numpy", "npu")
    assert main(["run", str(tiny), PROMPT, "--raw", "--max-tokens", "2", *options]) == 0
    assert "npu+numpy backend, budget 1 GB, context 64, simulated npu" in capsys.readouterr().err
    assert main(["plan", str(tiny), *options]) == 0
    shown = capsys.readouterr().out
    assert "prompts on another backend" in shown
    assert "simulated: npu" in shown


def test_it_is_never_chosen_by_itself(tiny: Path) -> None:
    choice = choose(open_model(tiny), "auto", Asked(str(tiny), GB, 1))
    assert "npu" not in choice.names
    assert choose(open_model(tiny), "npu+auto", Asked(str(tiny), GB, 1)).names[0] == f"npu+{choice.names[0]}"


@pytest.mark.parametrize(
    ("backend", "error"),
    [("npu+cpu", "backend 'cpu' is not available"), ("gpu+numpy", "backend 'gpu' is not available")],
)
def test_both_backends_must_exist(tiny: Path, backend: str, error: str) -> None:
    with pytest.raises(edgelm.UnknownBackend, match=error):
        edgelm.load(tiny, backend=backend, memory="1GB")


def test_a_budget_that_holds_neither_says_what_both_need(tiny: Path) -> None:
    with pytest.raises(edgelm.BudgetTooSmall) as caught:
        edgelm.load(tiny, backend="npu+numpy", memory="1MB", threads=1, context=64)
    assert caught.value.needed_bytes > 1_000_000
