"""What is learned for guesses outlives a process where that is asked for, and a damaged file costs nothing."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import edgelm
from edgelm.engine.speculation.chances import Chances
from edgelm.engine.speculation.recycling import MOST_TOKENS, SUCCESSORS, Recycling
from edgelm.files import kept
from edgelm.testing import tiny_model

IDS = list(range(20, 60))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_rates: None) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "llama.gguf", "llama", n_vocab=384)


def load(path: Path, keep: bool = True) -> edgelm.Model:
    return edgelm.load(path, memory="1GB", backend="numpy", threads=1, context=256, keep_guesses=keep)


def learned(model: edgelm.Model) -> np.ndarray:
    assert model._speculator is not None
    return model._speculator.table


def learn(model: edgelm.Model, token: int) -> None:
    assert model._speculator is not None
    model._speculator.recycle(token, np.arange(SUCCESSORS))


def test_a_table_says_what_was_learned() -> None:
    one, other = Recycling(Chances()), Recycling(Chances())
    assert one.table.shape == (0, 1 + SUCCESSORS)
    for token in (7, 3, 7, 5):
        one.learn(token, np.arange(SUCCESSORS) + token)
    assert one.table[:, :2].tolist() == [[3, 3], [7, 7], [5, 5]]
    other.table = one.table
    other.begin([1, 7])
    assert [guess.token for guess in other.propose([])] == list(range(7, 7 + SUCCESSORS))


def test_the_next_process_knows_what_was_learned(path: Path) -> None:
    with load(path) as model:
        learn(model, 42)
        known = learned(model)
    (file,) = kept.folder().glob("*.guesses")
    if os.name == "posix":
        assert file.stat().st_mode & 0o77 == 0
    with load(path) as model:
        assert np.array_equal(learned(model), known)
        assert not any("guesses" in note for note in model.notes)
    with load(path, keep=False) as model:
        assert not len(learned(model))
        learn(model, 43)
    with load(path) as model:
        assert np.array_equal(learned(model), known)
    assert kept.remove("of another model") == 0
    assert kept.remove() > 0
    with load(path) as model:
        assert not len(learned(model))


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"", "no table"),
        (b"something else", "no table"),
        (b"edgelmG1" + bytes(35), "no table"),
        (b"edgelmG1" + bytes(36 * (MOST_TOKENS + 1)), "no table"),
        (b"edgelmG1" + b"\xff" * 36, "does not know"),
    ],
)
def test_a_damaged_file_is_a_note(path: Path, content: bytes, fact: str) -> None:
    with load(path) as model:
        learn(model, 42)
    (file,) = kept.folder().glob("*.guesses")
    file.write_bytes(content)
    with load(path) as model:
        assert any(fact in note for note in model.notes)
        assert len(model.generate("the cat", max_tokens=4, ignore_eos=True)) > 0


def test_a_folder_that_refuses_is_a_note(path: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with load(path) as model:
        assert any("cannot be kept" in note for note in model.notes)
        learn(model, 42)


def test_without_guessing_nothing_is_kept(path: Path) -> None:
    with edgelm.load(path, memory="1GB", backend="numpy", threads=1, speculate=False, keep_guesses=True) as model:
        assert any("no guesses are kept" in note for note in model.notes)
    assert not list(kept.folder().glob("*.guesses"))
