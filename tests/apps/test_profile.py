"""`edgelm profile` on a tiny model: children at real budgets, JSON, and the page in a real browser."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import Browser, browser, installed

from edgelm.testing import tiny_model

CHARTS = ("speed", "memory", "split", "tokens", "units", "bytes")
N_TOKENS = 6
in_chromium = pytest.mark.skipif(installed() is None, reason="there is no Chromium here (Debian: apt install chromium)")


class Profiled(NamedTuple):
    page: Path
    data: dict[str, Any]
    err: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"n_layers": 6, "n_embd": 256, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "n_ff": 1024, "n_vocab": 4096}
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny <b>&amp;.gguf", "llama", **shape)


@pytest.fixture(scope="module")
def profiled(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    folder = tmp_path_factory.mktemp("profile")
    page, data = folder / "page.html", folder / "data.json"
    options = ["--budgets", "3", "--backend", "numpy", "--threads", "1", "--context", "128", "--prompt", "the"]
    done = subprocess.run(
        [sys.executable, "-m", "edgelm_apps.cli", "profile", str(model), *options, "--tokens", str(N_TOKENS),
         "-o", str(page), "--json", str(data)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "EDGELM_CACHE": str(folder / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Profiled(page, json.loads(data.read_text()), done.stderr)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


def test_budgets_go_from_the_smallest_to_all_resident(profiled: Profiled) -> None:
    least, middle, most = profiled.data["runs"]
    streamed = [run["plan"]["streamed_bytes_per_pass"] for run in (least, middle, most)]
    assert streamed[0] > streamed[1] > streamed[2] == 0
    assert least["plan"]["budget_bytes"] == least["budget_bytes"] >= profiled.data["smallest_bytes"]
    assert profiled.data["failed"] == []
    assert "2 of 3" in profiled.err


def test_each_run_has_a_process_and_a_peak_of_its_own(profiled: Profiled) -> None:
    for run in profiled.data["runs"]:
        highest = max(rss for _, rss in run["memory"])
        # the peak is the kernel's, samples come every 20 ms
        assert 0.9 * highest <= run["usage"]["peak_bytes"] <= run["budget_bytes"]
    peaks = [run["usage"]["peak_bytes"] for run in profiled.data["runs"]]
    assert peaks[0] < peaks[-1]


def test_tokens_add_up_and_units_are_told(profiled: Profiled) -> None:
    for run in profiled.data["runs"]:
        assert len(run["tokens"]) == N_TOKENS - 1
        parts_s = sum(token[part] for token in run["tokens"] for part in ("wait_s", "compute_s", "sample_s", "other_s"))
        assert parts_s == pytest.approx((N_TOKENS - 1) / run["usage"]["decode_tps"], rel=0.02)
        kinds = {event["kind"] for event in run["events"]}
        assert {"compute", "sample", "token"} <= kinds
        assert ("read" in kinds) == (run["plan"]["streamed_bytes_per_pass"] > 0)
        assert run["events_dropped"] == 0


def test_plans_between_the_budgets_are_predicted(profiled: Profiled) -> None:
    predicted = [plan["predicted_decode_tps"] for plan in profiled.data["plans"]]
    assert len(predicted) > 20
    assert min(predicted) > 0


def test_the_page_says_every_figure_without_a_script(profiled: Profiled) -> None:
    text = profiled.page.read_text(encoding="utf-8")
    before, _, _ = text.partition("<script>")
    assert "tiny &lt;b&gt;&amp;amp;.gguf at 3 memory budgets" in before
    for run in profiled.data["runs"]:
        assert f"{run['usage']['decode_tps']:.3g}" in before
    assert "interpreter, libraries and tokenizer" in before
    assert text.count("plotly.js v") == 1
    assert 'src="http' not in text
    assert "<link" not in before


@in_chromium
@pytest.mark.parametrize(("width", "height", "dark"), [(390, 844, False), (1280, 900, True)])
def test_charts_are_drawn_in_a_browser(
    profiled: Profiled, chromium: Browser, width: int, height: int, dark: bool
) -> None:
    chromium.open(profiled.page, width, height, dark=dark, until="document.body.dataset.drawn")
    assert chromium.problems == []
    assert {address.partition(":")[0] for address in chromium.requests} <= {"file", "data", "blob", "about"}
    assert chromium.value("document.documentElement.scrollWidth") <= width
    for chart in CHARTS:
        marks = chromium.value(f"document.querySelectorAll('#{chart} .trace, #{chart} .bars path').length")
        assert marks > 0, chart
        right = chromium.value(f"document.getElementById('{chart}').getBoundingClientRect().right")
        assert right <= width
        assert chromium.value(f"document.querySelector('#{chart} .main-svg').getBoundingClientRect().right") <= width


@in_chromium
def test_another_run_can_be_chosen(profiled: Profiled, chromium: Browser) -> None:
    chromium.open(profiled.page, 390, 844, until="document.body.dataset.drawn")
    before = chromium.value("document.getElementById('units-reading').textContent")
    assert "flash was busy" in before
    chromium.value(
        "(() => { const run = document.getElementById('run'); run.value = '2'; "
        "run.dispatchEvent(new Event('change')); })()"
    )
    assert "nothing is read" in chromium.value("document.getElementById('units-reading').textContent")
    assert chromium.problems == []


@pytest.mark.slow
def test_json_needs_no_plotly_and_a_budget_that_fails_is_told(
    model: Path, edgelm_command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "plotly" else find(name, *rest)
    )
    monkeypatch.chdir(tmp_path)
    options = ("--backend", "numpy", "--context", "64", "--tokens", "2", "--prompt", "the", "--memory", "1MB,200MB")
    result = edgelm_command("profile", str(model), *options, "--json", "-", "-q")
    assert result.code == 0
    data = result.json()
    assert [run["budget_bytes"] for run in data["runs"]] == [200_000_000]
    ((failed, why),) = data["failed"]
    assert failed == 1_000_000
    assert "budget 1 MB is too small" in why
    assert list(tmp_path.glob("*.html")) == []
    without = edgelm_command("profile", str(model), *options)
    assert without.code == 1
    assert "pip install 'edgelm[profile]'" in without.err


@pytest.mark.slow
def test_no_budget_that_works_is_an_error_with_its_exit_code(model: Path, edgelm_command: Any, tmp_path: Path) -> None:
    result = edgelm_command("profile", str(model), "--backend", "numpy", "--memory", "1MB", "-q", "--json", "-")
    assert (result.code, result.out) == (6, "")
    assert "no budget worked" in result.err


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["--memory", "1GB", "--budgets", "2"], "give one of them"),
        (["-o", "nowhere/page.html"], "there is no folder nowhere"),
        (["--json", "-", "--memory", "1GB,lots"], "'lots' is not a size"),
        (["--json", "-", "--prompt", ""], "the prompt is empty"),
        (["--json", "-", "--prompt", "x", "--prompt-file", os.devnull], "not both"),
    ],
)
def test_mistakes_exit_2_before_anything_is_measured(edgelm_command: Any, argv: list[str], fact: str) -> None:
    result = edgelm_command("profile", "no-such-model", *argv)
    assert (result.code, result.out) == (2, "")
    assert fact in result.err
