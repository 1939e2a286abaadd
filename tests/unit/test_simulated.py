"""Simulated devices: slower flash, their budget and threads where nobody gave others, and labels everywhere."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import edgelm
from edgelm import opening
from edgelm.engine import reading
from edgelm.errors import ConfigError
from edgelm.memory.platform import current_platform
from edgelm.sizes import GB, MB
from edgelm.testing import tiny_model

SLOWEST = "pi4-sd"
OPTIONS = {"backend": "numpy", "context": 64}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", n_vocab=20_000)


def test_the_table_is_sound() -> None:
    for name, device in edgelm.devices().items():
        assert device.name == name
        assert 10 * MB < device.flash_bytes_per_s < 10 * GB
        assert 0 < device.latency_s < 0.01
        assert device.n_threads >= 1
        assert device.memory_bytes >= 500 * MB
        assert device.about


def test_latency_slows_small_reads_down() -> None:
    device = edgelm.devices()[SLOWEST]
    assert device.read_bytes_per_s(4096) < 0.2 * device.flash_bytes_per_s
    assert 0.99 * device.flash_bytes_per_s < device.read_bytes_per_s(100 * MB) < device.flash_bytes_per_s


def test_an_unknown_device_names_the_known(model_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'pi9' \(known: pi4-sd, .*laptop-sata\)"):
        edgelm.load(model_file, simulate="pi9")


def test_the_device_stands_in_for_what_is_not_given(model_file: Path) -> None:
    plan = edgelm.plan(model_file, simulate=SLOWEST, **OPTIONS)
    assert plan.budget_bytes == edgelm.devices()[SLOWEST].memory_bytes
    given = edgelm.plan(model_file, simulate=SLOWEST, memory="400MB", **OPTIONS)
    assert given.budget_bytes == 400 * MB


def test_threads_are_the_device_s_unless_given(model_file: Path) -> None:
    with edgelm.load(model_file, simulate=SLOWEST, **OPTIONS) as model:
        assert model.threads == min(edgelm.devices()[SLOWEST].n_threads, current_platform().cores())
    with edgelm.load(model_file, simulate=SLOWEST, threads=1, **OPTIONS) as model:
        assert model.threads == 1


def test_the_plan_counts_with_the_device_s_flash(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("the flash of this machine is not asked")

    monkeypatch.setattr(reading, "read_pattern", refuse)
    fast = edgelm.plan(model_file, simulate="laptop-sata", memory="2GB", **OPTIONS)
    assert fast.simulated == "laptop-sata"
    assert fast.predicted_decode_tps > 0


def test_everything_is_labelled(model_file: Path) -> None:
    with edgelm.load(model_file, simulate=SLOWEST, **OPTIONS) as model:
        usage = list(model.stream("the cat", max_tokens=2))[-1].usage
        notes, plan = " ".join(model.notes), model.plan
    said = "the processor is this machine's own, not slowed down"
    assert usage.simulated == plan.simulated == plan.as_dict()["simulated"] == SLOWEST
    assert f"simulated flash of {SLOWEST} (45 MB/s, 0.5 ms a read); {said}" in notes
    assert f"simulated: {SLOWEST}; {said}" in str(plan)


def test_nothing_is_labelled_without(model_file: Path) -> None:
    with edgelm.load(model_file, memory="2GB", **OPTIONS) as model:
        assert list(model.stream("the cat", max_tokens=2))[-1].usage.simulated is None
        assert model.plan.as_dict()["simulated"] is None
        assert "simulated" not in f"{model.plan} {model.notes}"


def test_weights_that_stay_are_read_at_the_device_s_speed(model_file: Path) -> None:
    began = time.perf_counter()
    with edgelm.load(model_file, simulate=SLOWEST, **OPTIONS) as model:
        elapsed = time.perf_counter() - began
        pinned_bytes = model.plan.pinned_bytes
    assert pinned_bytes > 5 * MB
    assert elapsed >= pinned_bytes / edgelm.devices()[SLOWEST].flash_bytes_per_s


def test_published_figures_stand_in_for_a_measured_processor(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is measured")

    monkeypatch.setattr(opening, "measured_rates", refuse)
    plan = edgelm.plan(model_file, simulate="pi5-nvme", published=True, **OPTIONS)
    processor = edgelm.devices()["pi5-nvme"].processor
    assert processor is not None
    assert plan.predicted_decode_tps == pytest.approx(processor.compute_bytes_per_s / plan.pass_bytes)
    assert plan.published
    assert plan.as_dict()["published"] is True
    assert "expected of pi5-nvme from published figures; nothing of it was measured" in str(plan)
    assert "this machine's own" not in str(plan)


def test_published_figures_need_a_device_that_has_some(model_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing is known of the processor of phone-ufs3 \(known: pi4-sd, .*\)"):
        edgelm.plan(model_file, simulate="phone-ufs3", published=True, **OPTIONS)
    with pytest.raises(ConfigError, match="name it with simulate"):
        edgelm.plan(model_file, published=True, **OPTIONS)


def test_a_simulated_flash_leaves_the_processor_alone(model_file: Path) -> None:
    assert edgelm.plan(model_file, simulate="pi5-nvme", **OPTIONS).published is False
