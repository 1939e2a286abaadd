"""Speeds are measured once, kept with what they hold for, and take no memory to speak of."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from edgelm.engine import calibration
from edgelm.engine.calibration import measured_rates
from edgelm.engine.health import check
from edgelm.engine.registry import get_backend
from edgelm.files.gguf import open_model
from edgelm.memory.meter import Meter
from edgelm.memory.stores import open_store
from edgelm.sizes import MB
from edgelm.testing.memory import peak_growth_bytes
from edgelm.testing.tiny import tiny_model

FLASH = 1e9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def steady(monkeypatch):
    """A machine that disturbs nobody: what is kept must not depend on the load of the one that runs the tests."""
    monkeypatch.setattr(calibration, "_switches", lambda: 0)
    monkeypatch.setattr(calibration, "STEADY", float("inf"))
    monkeypatch.setattr(calibration, "_ENOUGH", 1)


@pytest.fixture(params=["numpy", "llamacpp"])
def backend(request):
    if not (found := check(request.param)).available:
        pytest.skip(f"{request.param}: {found.reason}")
    return get_backend(request.param)


@pytest.fixture
def session(backend):
    opened = backend.open(1)
    yield opened
    opened.close()


@pytest.fixture
def file(tmp_path):
    return open_model(tiny_model(tmp_path / "tiny.gguf", "llama", types={"default": "Q4_0", "token_embd": "Q8_0"}))


class Counted:
    """A session that counts what it compiles."""

    def __init__(self, session):
        self.session, self.n_compiled = session, 0

    def compile(self, segment, shape):
        self.n_compiled += 1
        return self.session.compile(segment, shape)


@pytest.mark.usefixtures("steady")
def test_rates_are_plausible_and_kept(backend, session, file, cache):
    counted = Counted(session)
    first = measured_rates(backend, counted, file, 1, FLASH)
    assert counted.n_compiled == 5  # two types, one of them wide, and the block, both
    assert first.flash_bytes_per_s == FLASH
    assert 1 * MB < first.compute_bytes_per_s < 1e12
    assert 1e-7 < first.pass_overhead_s < 10
    again = measured_rates(backend, counted, file, 1, FLASH)
    assert counted.n_compiled == 5
    assert (again.compute_bytes_per_s, again.pass_overhead_s) == (first.compute_bytes_per_s, first.pass_overhead_s)
    measured_rates(backend, counted, file, 2, FLASH)
    assert counted.n_compiled == 10, "other threads, other rates"


@pytest.mark.usefixtures("steady")
def test_types_are_measured_once_for_all_models(backend, session, file, tmp_path):
    counted = Counted(session)
    measured_rates(backend, counted, file, 1, FLASH)
    other = open_model(tiny_model(tmp_path / "other.gguf", "llama", types={"default": "Q5_0", "token_embd": "Q8_0"}))
    measured_rates(backend, counted, other, 1, FLASH)
    assert counted.n_compiled == 7


@pytest.mark.usefixtures("steady")
def test_old_and_damaged_measurements_are_repeated(backend, session, file, cache):
    counted = Counted(session)
    measured_rates(backend, counted, file, 1, FLASH)
    (kernels,) = (cache / "rates").glob("kernels-*.json")
    said = json.loads(kernels.read_text())
    for change in ({"measured_at_s": time.time() - calibration.KEPT_S - 1}, {"rates": 3}, {"measured_at_s": "now"}):
        kernels.write_text(json.dumps(said | change))
        before = counted.n_compiled
        measured_rates(backend, counted, file, 1, FLASH)
        assert counted.n_compiled == before + 5


def test_a_disturbed_measurement_is_not_kept(backend, session, file, cache, monkeypatch):
    counts = iter(range(10**9))
    monkeypatch.setattr(calibration, "_switches", lambda: next(counts))
    rates = measured_rates(backend, session, file, 1, FLASH)
    assert rates.compute_bytes_per_s > 0
    assert not list(cache.glob("rates/kernels-*"))


def test_a_cache_that_cannot_be_written(session, backend, file, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file" / "below"))
    assert measured_rates(backend, session, file, 1, FLASH).flash_bytes_per_s > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
@pytest.mark.parametrize("limit_bytes", [8 * MB, 20 * MB])
def test_measuring_stays_inside_its_limit(backend, session, file, limit_bytes):
    measured_rates(backend, session, file, 1, FLASH, limit_bytes=5 * MB)  # code and buffers of the libraries
    before = Meter().sample().rss_bytes
    grown = peak_growth_bytes(lambda: measured_rates(backend, session, file, 3, FLASH, limit_bytes=limit_bytes))
    assert grown is None or grown <= limit_bytes
    assert Meter().sample().rss_bytes - before < 2 * MB


def test_cached_rates_cost_little(backend, session, file, steady):
    measured_rates(backend, session, file, 1, FLASH)
    kernels = calibration._Kernels(backend, session, 1, calibration.LIMIT_BYTES)

    def seconds():
        start = time.perf_counter()
        calibration._Kernels(backend, session, 1, calibration.LIMIT_BYTES).overhead_s()
        return time.perf_counter() - start

    assert kernels.overhead_s() > 0
    assert min(seconds() for _ in range(10)) < 0.005


def test_an_embedding_that_is_not_the_head_is_no_part_of_a_pass(tmp_path):
    types = {"default": "Q4_0", "token_embd": "Q8_0", "output": "Q5_0"}
    shares = calibration._shares(open_model(tiny_model(tmp_path / "m.gguf", "llama", types=types, tied=False)))
    assert {kind.name for kind, _ in shares} == {"Q4_0", "Q5_0"}
    assert sum(shares.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"])
def test_a_resident_model_decodes_as_fast_as_predicted(name):
    from edgelm.engine.loading import Request, build, prepare

    folder = os.environ.get("EDGELM_TEST_MODELS")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip(f"EDGELM_TEST_MODELS has no {name}")
    if not (found := check("llamacpp")).available:
        pytest.skip(found.reason)
    from edgelm.memory.platform import current_platform

    n_threads = current_platform().cores()
    if os.getloadavg()[0] > 0.5:
        pytest.skip("the machine is busy: nothing can be predicted")
    file, chosen = open_model(Path(folder) / name), get_backend("llamacpp")
    session = chosen.open(n_threads)
    opened, _ = open_store([str(path) for path in file.paths])
    rates = measured_rates(chosen, session, file, n_threads, FLASH, limit_bytes=100 * MB)
    prepared = prepare(file, chosen, session, Request(600 * MB, 1024, n_threads), 50 * MB, rates)
    engine = build(prepared, opened)
    engine.forward(list(range(5, 37)))
    times = []
    for i in range(60):
        start = time.perf_counter()
        engine.forward([100 + i])
        times.append(time.perf_counter() - start)
    engine.close()
    assert prepared.plan.predicted_decode_tps == pytest.approx(1 / sorted(times)[30], rel=0.25)
