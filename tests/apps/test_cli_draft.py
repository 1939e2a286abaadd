"""`edgelm draft`, and what `list`, `rm` and `--draft auto` make of a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgelm
from edgelm.testing import tiny_model
from edgelm_models import cache
from edgelm_models.cache import CachedModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384)


def test_a_copy_is_made_listed_used_and_removed(edgelm_command, model):
    made = edgelm_command("draft", str(model))
    assert made.code == 0
    assert made.out.rstrip().endswith(", Q4_0)")
    assert edgelm_command("draft", str(model)).out.rstrip().endswith(", Q4_0, made before)")
    (copy,) = edgelm_command("list", "--json").json()["drafts"]
    assert (copy["model"], copy["type"], Path(copy["path"]).is_file()) == ("tiny.gguf", "Q4_0", True)
    assert "low-bit copy of" in edgelm_command("list").out
    options = ["--memory", "1GB", "--backend", "numpy", "--context", "64", "--draft", "auto"]
    assert "draft model" in edgelm_command("plan", str(model), *options).out
    answer = edgelm_command("run", str(model), "hello", "--max-tokens", "2", *options)
    assert answer.code == 0
    assert "draft model" in answer.err
    assert edgelm_command("rm", "--drafts", str(model)).out.startswith(f"every low-bit copy of {model} is removed")
    assert edgelm_command("list", "--json").json()["drafts"] == []
    assert "there is no low-bit copy of tiny.gguf" in edgelm_command("run", str(model), "hi", *options).err


def test_as_json_and_quietly(edgelm_command, model):
    facts = edgelm_command("draft", str(model), "--json").json()
    assert set(facts) == {"path", "source", "type", "size_bytes", "source_bytes", "made"}
    assert edgelm_command("draft", str(model), "--quiet") == (0, "", "")


def test_a_type_that_is_none_is_a_users_mistake(edgelm_command, model):
    result = edgelm_command("draft", str(model), "--type", "nonsense")
    assert (result.code, result.out) == (2, "")
    assert "'nonsense' is no type of few bits; take Q4_0" in result.err


def test_removing_a_model_removes_its_copies(edgelm_command, tmp_path):
    staged = tmp_path / "staged"
    staged.mkdir()
    file = tiny_model(staged / "tiny.gguf", "llama", n_vocab=384)
    entry = CachedModel("tiny", file.name, (file.name,), file.stat().st_size, "", "F32", 256, "", "wheel", 0.0)
    copy = edgelm.draft_copy(cache.register(entry, staged).path)
    assert copy.path.is_file()
    assert edgelm_command("rm", "tiny").code == 0
    assert not copy.path.exists()
