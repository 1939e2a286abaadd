"""Whatever README.md and docs/*.md tell to type runs, and ends as they say.

Words of a model and measured figures differ from machine to machine, so of what a page shows these are compared: the
exit code, errors (but for their numbers), the headings of tables, and the keys of JSON.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress

import pytest
from fences import BLOCKS, PYTHON, SHELL, STEPS, Block, Step
from real_models import REAL_MODELS
from running import Done, Sandbox, lacking, real_models

ERROR = "edgelm: error: "
SLOW = re.compile(r"(\$ )?edgelm (serve|bench|profile|verify|backends \S*\.gguf|doctor|.*--simulate)")
"""What measures, and takes seconds with the smallest model."""


@pytest.fixture(scope="session")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    sandbox = Sandbox(tmp_path_factory.mktemp("docs"), REAL_MODELS)
    yield sandbox
    sandbox.close()


def _slow(block: Block) -> bool:
    """A block is slow as a whole: its commands may need one another."""
    lines = block.text.splitlines()
    return "slow" in block.said or any(real_models(line) or SLOW.match(line) for line in lines)


@pytest.mark.skipif(shutil.which("bash") is None, reason="commands are written for bash")
@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[pytest.mark.slow] * _slow(step.block), id=str(step)) for step in STEPS]
)
def test_it_runs(step: Step, sandbox: Sandbox) -> None:
    if reason := step.block.said.get("not run"):
        pytest.skip(f"not run: {reason}")
    if missing := sorted(real_models(step.text) - set(REAL_MODELS)):
        pytest.skip(f"{', '.join(missing)} not here: `edgelm pull`, or name a folder in EDGELM_TEST_MODELS")
    if missing := lacking(step.text, step.block.said.get("needs", "")):
        pytest.skip(f"needs {', '.join(missing)}")
    done = sandbox.place(step.block).run(step)
    report = f"{step.text}\n{done.out[-2000:]}\n{done.err[-4000:]}"
    shown = _joined(step.shown)
    error = next((line for line in shown if line.startswith(ERROR)), None)
    stated = step.block.said.get("exit", "0" if error is None else None)
    assert done.code == int(stated) if stated is not None else done.code != 0, report
    if error is not None:
        assert _shape(error) in _shape(done.err), report
    if step.block.language in SHELL:
        assert "Traceback" not in done.err, report
    for line in shown:
        _compare(line, done, report)


def test_every_block_says_what_it_is() -> None:
    """A block without a language would be passed over."""
    known = {*SHELL, *PYTHON, "text", "toml", "json", "yaml", "html", "ini", "systemd"}
    assert not [str(block) for block in BLOCKS if block.language not in known]


def _joined(shown: tuple[str, ...]) -> list[str]:
    """Put an error that the page breaks into lines together again."""
    lines: list[str] = []
    for line in shown:
        if lines and lines[-1].startswith(ERROR):
            lines[-1] += f" {line}"
        else:
            lines.append(line)
    return lines


def _shape(text: str) -> str:
    """Return a message without its numbers, and in single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"\d+(\.\d+)?( [kMG]?B)?", "N", text))


def _compare(line: str, done: Done, report: str) -> None:
    headings = re.split(r"\s{2,}", line.strip())
    if len(headings) >= 3 and not re.search(r"\d", line):
        assert headings in [re.split(r"\s{2,}", one.strip()) for one in done.out.splitlines()], report
    with suppress(json.JSONDecodeError):
        expected = json.loads(line)
        if isinstance(expected, dict):
            assert json.loads(done.out).keys() == expected.keys(), report
