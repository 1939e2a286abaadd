"""docs/embedding.md is true: every block of Python runs, the table of wheels is what was measured."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/embedding.md").read_text(encoding="utf-8")
BLOCKS = {
    PAGE.count("\n", 0, match.start()) + 1: match[1]
    for match in re.finditer(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
}


@pytest.mark.parametrize("line", BLOCKS)
def test_every_block_runs(
    line: int, tiny: Path, loads: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone, as it would be copied, in a folder with a model in it."""
    shutil.copy(tiny, tmp_path / "model.gguf")
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * line + BLOCKS[line], "docs/embedding.md", "exec"), {"__name__": "__main__"})


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 8


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
