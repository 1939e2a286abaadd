"""Expectations: a table of predictions that never looks like one of measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

import edgelm
from edgelm.testing import tiny_model
from edgelm_apps.pi import expect as expecting

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., Result]
COMMAND = """
import sys
from edgelm_apps.cli import main
from edgelm_apps.pi import expect
expect.usable_backend = lambda: "numpy"
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expecting, "usable_backend", lambda: "numpy")  # others take a second to be tried


def test_the_table(edgelm_command: Command, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf", "llama")
    done = edgelm_command("pi", "expect", str(model), "--memory", "300MB", "--context", "64")
    assert done.code == 0, done.err
    assert "predictions by the planner from published figures; nothing was measured on a board" in done.out
    rows = [line.split() for line in done.out.splitlines() if line.startswith("pi")]
    assert [row[0] for row in rows if row[1:3] == ["300", "MB"]] == [
        "pi4-sd",
        "pi4-usb-ssd",
        "pi5-sd",
        "pi5-nvme",
        "pi5-nvme-gen3",
    ]
    for source in ("geerlingguy/ai-benchmarks#7", "aidatatools/ollama-benchmark#9"):
        assert source in done.out


def test_json_has_the_constants_and_their_sources(tmp_path: Path) -> None:
    """In a process of its own, as large as that of a command is, so that budgets are chosen as for a command."""
    model = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=60_000)
    words = ["pi", "expect", str(model), "--board", "pi5-nvme", "--context", "64", "--json"]
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["measured"] is False
    device = edgelm.devices()["pi5-nvme"]
    assert device.processor is not None
    assert facts["devices"]["pi5-nvme"]["processor"]["source"] == device.processor.source
    rows = facts["expected"]
    assert len(rows) > 1
    for row in rows:
        assert row["planned_bytes"] <= row["budget_bytes"] <= device.memory_bytes
    assert rows[0]["streamed_bytes"] > 0
    assert rows[-1]["streamed_bytes"] == 0
    assert rows[-1]["decode_tps"] == pytest.approx(device.processor.compute_bytes_per_s / rows[-1]["resident_bytes"])
    assert rows[0]["decode_tps"] < rows[-1]["decode_tps"]


def test_a_budget_that_is_too_small_is_refused(edgelm_command: Command, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf", "llama")
    done = edgelm_command("pi", "expect", str(model), "--memory", "1MB")
    assert done.code == 6
    assert "too small" in done.err


def test_the_table_of_the_documentation_is_that_of_the_results() -> None:
    page = (ROOT / "docs/raspberry-pi.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench/results/pi_expect.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) > 1
    for title, table in rows.items():
        for row in table if title != "Constants" else ():
            cells = [row[column] for column in ("board", "budget", "in memory", "read a token", "tok/s", "first token")]
            assert f"| {' | '.join(cells)} |" in page
