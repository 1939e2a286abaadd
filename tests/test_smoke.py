"""Does it answer at all? A tiny model on the NumPy backend, through the library and the command line, in seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgelm
from edgelm.testing import tiny_model

BUDGET = 1_000_000_000  # this process holds a test suite, too


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama")


def test_the_library_answers(model_file: Path) -> None:
    with edgelm.load(model_file, memory=BUDGET, backend="numpy", threads=1, context=64) as model:
        chunks = list(model.stream("the", max_tokens=6, ignore_eos=True))
        again = model.generate("the", max_tokens=6, ignore_eos=True)
        chat = model.chat(system="Be brief.")
        chat.send("the end", max_tokens=4)
    usage = chunks[-1].usage
    assert "".join(chunk.text for chunk in chunks) == again
    assert (chunks[-1].finish_reason, usage.completion_tokens, usage.backend) == ("length", 6, "numpy")
    assert 0 < usage.peak_bytes <= usage.budget_bytes == BUDGET
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]


def test_a_budget_that_is_too_small_names_one_that_works(model_file: Path) -> None:
    with pytest.raises(edgelm.BudgetTooSmall) as caught:
        edgelm.load(model_file, memory="1MB", backend="numpy", threads=1, context=64)
    assert caught.value.given_bytes == 1_000_000 < caught.value.needed_bytes


def test_the_command_line_answers(model_file: Path) -> None:
    command = [sys.executable, "-m", "edgelm_apps.cli", "run", str(model_file), "the", "--raw", "--json"]
    command += ["--backend", "numpy", "--memory", "300MB", "--threads", "1", "--context", "64", "--max-tokens", "4"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["backend"] == "numpy"
    assert 1 <= answer["completion_tokens"] == len(answer["token_ids"]) <= 4
    assert answer["stats"]["peak_bytes"] <= answer["budget_bytes"] == 300_000_000
