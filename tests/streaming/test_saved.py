"""Keys and values on flash: read back by another process or backend they spare the prompt, or are refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import need

import edgelm
from edgelm import opening
from edgelm.errors import ConfigError, ModelFileError
from edgelm.files import kept
from edgelm.memory.predict import Rates
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(3).integers(3, 250, 70).tolist()
SYSTEM = "you are a cat and " * 20


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384, head_dim=32) for name in ("llama", "gemma3")}
    return made | {"other": tiny_model(folder / "other.gguf", "llama", n_vocab=384, head_dim=32, seed=9)}


def load(path: Path, **options: Any) -> edgelm.Model:
    return edgelm.load(path, **{"memory": GB, "backend": "numpy", "threads": 1, "context": 256, **options})


@pytest.fixture
def model(models: dict[str, Path]) -> Iterator[edgelm.Model]:
    with load(models["llama"]) as model:
        yield model


def tokens(model: edgelm.Model, ids: list[int]) -> tuple[list[int], int]:
    chunks = list(model.stream_ids(ids, max_tokens=10, ignore_eos=True, speculate=False))
    return [chunk.token_id for chunk in chunks if chunk.token_id is not None], chunks[-1].usage.cached_tokens


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("other", [{}, {"backend": "llamacpp"}, {"backend": "onnx"}, {"backend": "mlx"}])
def test_what_is_saved_goes_on_with_any_backend(
    models: dict[str, Path], tmp_path: Path, architecture: str, other: dict[str, str]
) -> None:
    with load(models[architecture]) as model:
        expected, _ = tokens(model, IDS)
        model.stream_ids(IDS, max_tokens=1)
        n_bytes = model.save_cache(tmp_path / "a.kv")
        assert n_bytes == (tmp_path / "a.kv").stat().st_size
    need(other.get("backend", "numpy"))
    with load(models[architecture], **other) as model:
        assert model.load_cache(tmp_path / "a.kv") >= len(IDS)
        found, cached = tokens(model, IDS)
        assert cached == len(IDS) - 1
        assert found[:3] == expected[:3]
        if not other:
            assert found == expected


def test_other_types_take_over_what_is_saved(models: dict[str, Path], tmp_path: Path) -> None:
    with load(models["llama"]) as model:
        expected, _ = tokens(model, IDS)
        model.save_cache(tmp_path / "a.kv")
    with load(models["llama"], kv="q8_0") as model:
        model.load_cache(tmp_path / "a.kv")
        found, cached = tokens(model, IDS)
        assert cached == len(IDS) - 1
        assert found[0] == expected[0]
        own, _ = tokens(model, IDS)
        model.save_cache(tmp_path / "b.kv")
        stored = model._engine.arena.export(0, 0, len(IDS))
    assert (tmp_path / "b.kv").stat().st_size < 0.6 * (tmp_path / "a.kv").stat().st_size
    with load(models["llama"], kv="q8_0") as model:
        model.load_cache(tmp_path / "b.kv")
        for ours, theirs in zip(model._engine.arena.export(0, 0, len(IDS)), stored, strict=True):
            assert np.array_equal(ours, theirs)
        assert tokens(model, IDS)[0] == own


def test_a_kept_prefix_is_not_taken_for_one_of_more_bits(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path))
    for kv, n_kept in (("q4_0", 1), ("q4_0", 1), ("f16", 2)):
        with load(models["llama"], kv=kv, context=1024) as model:
            list(model.chat(SYSTEM, keep=True).stream("hello", max_tokens=2, ignore_eos=True))
        assert len(kept.listing()) == n_kept


def test_damaged_and_foreign_files_are_refused_and_nothing_is_lost(
    models: dict[str, Path], model: edgelm.Model, tmp_path: Path
) -> None:
    expected, _ = tokens(model, IDS)
    path = tmp_path / "a.kv"
    model.save_cache(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    wrong = [whole[:n] for n in (0, 5, 11, 40, len(whole) // 2, len(whole) - 1)] + [whole + b"x", b"GGUF" + whole[4:]]
    places = rng.integers(0, len(whole), 60)
    wrong += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in places]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(ModelFileError):
            model.load_cache(path)
        assert not model._conversation.stored
    assert tokens(model, IDS)[0] == expected
    path.write_bytes(whole)
    with load(models["other"]) as other, pytest.raises(ModelFileError, match="of another model"):
        other.load_cache(path)
    with load(models["llama"], context=64) as small, pytest.raises(ModelFileError, match="more than the context"):
        small.load_cache(path)


def test_a_conversation_is_saved_and_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    with load(models["llama"]) as model:
        chat = model.chat("be brief")
        chat.send("the cat", max_tokens=5, ignore_eos=True)
        chat.save(tmp_path / "talk.json")
        expected = chat.send("and the dog", max_tokens=5, ignore_eos=True)
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [one["role"] for one in saved["messages"]] == ["system", "user", "assistant"]
    for without in (False, True):
        if without:
            (tmp_path / "talk.kv").unlink()
        with load(models["llama"]) as model:
            chat = model.chat()
            assert ("computed again" in chat.load(tmp_path / "talk.json")) == without
            chunks = list(chat.stream("and the dog", max_tokens=5, ignore_eos=True))
            assert "".join(chunk.text for chunk in chunks) == expected
            assert (chunks[-1].usage.cached_tokens > 10) != without
    (tmp_path / "talk.json").write_text("[]")
    with load(models["llama"]) as model, pytest.raises(ConfigError, match="no saved conversation"):
        model.chat().load(tmp_path / "talk.json")


CHILD = """
import sys, edgelm
from edgelm import opening
from edgelm.memory.predict import Rates
opening.measured_rates = lambda *_, **__: Rates(1e9, 1e9)
with edgelm.load(sys.argv[1], memory=10**9, backend=sys.argv[3], threads=1, context=256) as model:
    chunks = list(model.chat(sys.argv[2], keep=True).stream("hello", max_tokens=3, ignore_eos=True))
    print(chunks[-1].usage.cached_tokens, chunks[-1].usage.prompt_tokens, *model.notes, sep="|")
"""


def test_a_kept_system_message_spares_the_next_process_its_computation(models: dict[str, Path]) -> None:
    def run(backend: str = "numpy") -> list[str]:
        argv = [sys.executable, "-c", CHILD, str(models["llama"]), SYSTEM, backend]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip().split("|")

    first, second = run(), run()
    assert any("kept in" in note for note in first[2:])
    assert not any("kept" in note for note in second[2:])
    assert 60 < int(second[0]) < int(second[1])
    third = run(need("llamacpp"))
    assert int(third[0]) == int(second[0])
    (one,) = kept.listing()
    assert (one.uses, one.model) == (2, "llama.gguf")
    assert one.n_tokens >= 64
    one.path.write_bytes(one.path.read_bytes()[:-3])
    mended = run()
    assert any("made anew" in note for note in mended[2:])
    assert int(run()[0]) == int(second[0])
    assert kept.remove() > 0
    assert kept.listing() == []


def test_what_is_worth_least_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kept.folder().mkdir(parents=True)
    paths = [kept.path_of("x", [number]) for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(1000))
        kept.note_use(path, "m", 100 * (number + 1), first=True)
    for _ in range(9):
        kept.note_use(paths[0], "m", 100)
    monkeypatch.setenv(kept.LIMIT_VARIABLE, "2500B")
    kept.keep_within_limit(paths[1])
    assert {one.path for one in kept.listing()} == {paths[0], paths[1]} or {one.path for one in kept.listing()} == {
        paths[0],
        paths[3],
    }


def test_an_answer_that_was_cut_off_and_a_second_turn_compute_only_what_is_new(model: edgelm.Model) -> None:
    chat = model.chat()
    list(chat.stream("the cat sat on the mat", max_tokens=8, ignore_eos=True))
    before = model._conversation.stored
    usage = list(chat.stream("and then", max_tokens=2, ignore_eos=True))[-1].usage
    assert usage.cached_tokens >= len(before) - 8
    assert usage.cached_tokens > 0
