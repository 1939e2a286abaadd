"""The backend of docs/example_backend, installed as a stranger's would be, keeps the contract and answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgelm.testing.tiny import tiny_model

EXAMPLE = Path(__file__).parents[2] / "docs" / "example_backend"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling builds the package: pip install hatchling")
def test_the_example_is_installed_tested_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(target), *filter(None, sys.path)]))

    def run(*argv: str) -> str:
        done = subprocess.run([sys.executable, "-P", "-m", *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    tests = shutil.copytree(source / "tests", tmp_path / "tests")
    assert " passed" in run("pytest", "-q", "-W", "error", "-p", "no:cacheprovider", str(tests))

    model = str(tiny_model(tmp_path / "tiny.gguf", "llama", types="Q8_0"))
    options = ("--max-tokens", "8", "--context", "64", "--memory", "500MB", "--json")
    answers = [
        json.loads(run("edgelm_apps.cli", "run", model, "Hello", "--backend", name, *options))
        for name in ("einsum", "numpy")
    ]
    assert answers[0]["backend"] == "einsum"
    assert answers[0]["token_ids"] == answers[1]["token_ids"]

    listed = json.loads(run("edgelm_apps.cli", "backends", model, "--memory", "500MB", "--json"))["candidates"]
    assert "einsum" in [one["name"] for one in listed if one["predicted_decode_tps"]]
    narrow = str(tiny_model(tmp_path / "narrow.gguf", "llama", types="Q4_0"))
    listed = json.loads(run("edgelm_apps.cli", "backends", narrow, "--memory", "500MB", "--json"))["candidates"]
    assert [one["reason"] for one in listed if one["name"] == "einsum"] == ["passed over, it does not compute Q4_0"]
