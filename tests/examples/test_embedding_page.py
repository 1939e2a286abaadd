"""The table of wheels in docs/embedding.md is what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")


def test_the_table_of_wheels_is_what_was_measured() -> None:
    spec = importlib.util.spec_from_file_location("mobile_wheels", ROOT / "bench/mobile_wheels.py")
    assert spec is not None
    assert spec.loader is not None
    measured = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measured)
    facts = json.loads(measured.RESULT.read_text(encoding="utf-8"))
    assert measured.table(facts) in PAGE
    assert f"on {facts['date']}:" in PAGE
    assert [row["name"] for row in facts["packages"]] == measured.requirements(), "run bench/mobile_wheels.py again"
