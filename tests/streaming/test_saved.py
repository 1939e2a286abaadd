"""Keys and values on flash: read back by another process or backend they spare the prompt, or are refused by name."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import need

import edgelm
import edgelm.prefixes
from edgelm.engine.generate import Conversation
from edgelm.errors import ConfigError, ModelFileError
from edgelm.files import kept, writing
from edgelm.memory import saved
from edgelm.memory.arena import KVArena, LayerCache
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(3).integers(3, 250, 70).tolist()
SYSTEM = "you are a cat and " * 20


pytestmark = pytest.mark.usefixtures("known_rates")


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
    with load(models["llama"]) as model, pytest.raises(ModelFileError, match="kept as q8_0, and this cache keeps f16"):
        model.load_cache(tmp_path / "b.kv")


def test_a_kept_prefix_is_not_taken_for_one_of_more_bits(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path))
    monkeypatch.setattr(edgelm.prefixes, "LEAST_S", 0.0)  # a tiny model computes it in no time
    for kv, n_kept in (("q4_0", 1), ("q4_0", 1), ("f16", 2)):
        with load(models["llama"], kv=kv, context=1024) as model:
            list(model.chat(SYSTEM, keep=True).stream("hello", max_tokens=2, ignore_eos=True))
        assert len(kept.listing()) == n_kept


RING = [LayerCache(0, 16, 2, 4, 4), LayerCache(1, 0, 2, 4, 4)]


def stored_at_random(n: int, chunk: int) -> KVArena:
    arena, rng = KVArena(RING, 512, chunk), np.random.default_rng(n)
    arena.restore(n, [max(n - arena.most_places(0), 0), 0])
    for layer in range(len(RING)):
        held = arena.held(layer)
        arena.import_(layer, int(held[0]), *rng.normal(size=(2, len(held), 2, 4)).astype(np.float32))
    return arena


@pytest.mark.parametrize(("written", "read"), [(16, 128), (128, 16), (64, 64)])
@pytest.mark.parametrize("n", [1, 20, 300])
def test_rings_of_another_width_take_over_what_they_have_places_for(
    tmp_path: Path, written: int, read: int, n: int
) -> None:
    first, second = stored_at_random(n, written), KVArena(RING, 512, read)
    saved.save(tmp_path / "a.kv", first, range(n), "model")
    assert saved.load(tmp_path / "a.kv", second, "model") == tuple(range(n))
    for layer in range(len(RING)):
        both = sorted(set(first.held(layer)) & set(second.held(layer)))
        assert len(both) >= min(15, n)
        assert both[-1] == n - 1
        for ours, theirs in zip(
            first.export(layer, both[0], len(both)), second.export(layer, both[0], len(both)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    assert second.truncate(n) == n
    with pytest.raises(ValueError, match="are missing"):
        second.restore(300, [290, 0])
    with pytest.raises(ValueError, match="are missing"):
        second.restore(300, [0, 1])


def test_a_file_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    saved.save(path, stored_at_random(20, 16), range(20), "model")
    text = path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for n in (-1, 513, 1 << 40):
        path.write_bytes(text.replace(b'"n": 20,', b'"n": %d,' % n).replace(*_longer(text, n)))
        with pytest.raises(ModelFileError):
            saved.load(path, KVArena(RING, 512, 16), "model")


def _longer(text: bytes, n: int) -> tuple[bytes, bytes]:
    """Return the length of the header, and what it is with another number in it."""
    length = int.from_bytes(text[8:12], "little")
    return text[:12], text[:8] + (length + len(str(n)) - 2).to_bytes(4, "little")


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
            (tmp_path / "talk.json.kv").unlink()
        with load(models["llama"]) as model:
            chat = model.chat()
            assert ("computed again" in chat.load(tmp_path / "talk.json")) == without
            chunks = list(chat.stream("and the dog", max_tokens=5, ignore_eos=True))
            assert "".join(chunk.text for chunk in chunks) == expected
            assert (chunks[-1].usage.cached_tokens > 10) != without
    with load(models["other"]) as model:
        chat = model.chat()
        assert "nothing of that was saved" in chat.load(tmp_path / "talk.json")
        assert len(chat.messages) == 3
    saved = json.dumps(saved | {"edgelm": 2})
    for content, what in (("[]", "no saved conversation"), (saved, "newer edgelm"), ('{"messages": 1}', "no saved")):
        (tmp_path / "talk.json").write_text(content)
        with load(models["llama"]) as model, pytest.raises(ConfigError, match=what):
            model.chat().load(tmp_path / "talk.json")


def test_a_conversation_of_another_model_keeps_its_messages(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(models["llama"]) as model:
        chat = model.chat("be brief")
        chat.send("the cat", max_tokens=5, ignore_eos=True)
        assert chat.save(tmp_path / "talk") == ""
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="cannot be written"):
            chat.save(tmp_path / "file" / "talk")
    with load(models["other"]) as model:
        chat = model.chat()
        assert "of another model" in chat.load(tmp_path / "talk")
        usage = list(chat.stream("and the dog", max_tokens=2, ignore_eos=True))[-1].usage
        assert (usage.cached_tokens, len(chat.messages)) == (0, 5)
        monkeypatch.setattr(Conversation, "not_to_be_saved", "graphs keep their own")
        assert "only the messages are saved" in chat.save(tmp_path / "talk")
        assert not (tmp_path / "talk.kv").exists()


CHILD = """
import sys, edgelm
from edgelm import opening, prefixes
prefixes.LEAST_S = float(sys.argv[4])
from edgelm.memory.predict import Rates
opening.measured_rates = lambda *_, **__: Rates(1e9, 1e9)
with edgelm.load(sys.argv[1], memory=10**9, backend=sys.argv[3], threads=1, context=256) as model:
    chunks = list(model.chat(sys.argv[2], keep=True).stream("hello", max_tokens=3, ignore_eos=True))
    print(chunks[-1].usage.cached_tokens, chunks[-1].usage.prompt_tokens, *model.notes, sep="|")
"""


def test_a_kept_system_message_spares_the_next_process_its_computation(models: dict[str, Path]) -> None:
    def run(backend: str = "numpy", least_s: float = 0) -> list[str]:
        argv = [sys.executable, "-c", CHILD, str(models["llama"]), SYSTEM, backend, str(least_s)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip().split("|")

    quick = run(least_s=100)
    assert any("is not kept: it takes" in note for note in quick[2:])
    assert kept.listing() == []
    first, second = run(), run()
    assert first[0] == "0", "what was computed for the file was computed"
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
    paths = [kept.path_of("print", "x", ("f16", "f16"), [number]) for number in range(4)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(1000))
        kept.note_use(path, "m", 100 * (number + 1), first=True)
    for _ in range(9):
        kept.note_use(paths[0], "m", 100)
    monkeypatch.setenv(kept.LIMIT_VARIABLE, "2500B")
    kept.keep_within_limit(paths[1])
    assert {one.path for one in kept.listing()} == {paths[0], paths[1]}, "the newest stays, and what is used"
    assert kept.remove("other") == 0
    assert kept.remove("print") == 2000


def test_types_of_few_bits_have_files_of_their_own() -> None:
    def path(*types: str) -> Path:
        return kept.path_of("print", "x", types, [1, 2])

    assert path("f16", "f16") == path("f32", "f32")
    assert len({path("f16", "f16"), path("q8_0", "f16"), path("f16", "q8_0"), path("q4_0", "q4_0")}) == 4


WRITER = """
import sys, time
from pathlib import Path
from edgelm.files.writing import whole_or_nothing
with whole_or_nothing(Path(sys.argv[1])) as file:
    file.write(bytes(1 << 20))
    file.flush()
    print("half", flush=True)
    time.sleep(60)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_counts(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm.prefixes.LEAST_S", 0)
    kept.make_folder()
    target = kept.path_of("print", "x", ("f16", "f16"), [1])
    with subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "half\n"
        (left,) = kept.folder().glob(f"*{writing.PARTIAL}")
        kept.make_folder()
        assert left.exists(), "what is being written stays"
        child.kill()
    assert left.exists()
    assert kept.listing() == []
    with load(models["llama"]) as model:
        model.chat(SYSTEM, keep=True).send("hello", max_tokens=1)
        assert len(kept.listing()) == 1
    assert not left.exists()


def test_a_message_that_cannot_be_kept_is_answered_all_the_same(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgelm.prefixes.LEAST_S", 0)
    kept.folder().parent.mkdir(parents=True, exist_ok=True)
    kept.folder().touch()
    with load(models["llama"]) as model:
        chunks = list(model.chat(SYSTEM, keep=True).stream("hello", max_tokens=2, ignore_eos=True))
        assert len(chunks) == 3
        assert "could not be kept" in model.notes[-1]


def spelling(tokenizer: Any, words: str) -> Any:
    """Return a processor that lets the model say `words` in tokens of one letter, again and again."""
    small = {
        tokenizer.token_bytes(token): token for token in range(tokenizer.n_vocab) if not tokenizer.is_special(token)
    }
    ids = [small[letter.encode()] for letter in words]
    said = 0

    def process(history: Any, logits: Any) -> Any:
        nonlocal said
        logits[ids[said % len(ids)]] += 1e6
        said += 1
        return logits

    return process


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_later_turn_computes_only_what_is_new_however_the_answer_was_spelled(
    models: dict[str, Path], architecture: str
) -> None:
    with load(models[architecture], context=1024) as model:
        chat = model.chat("be brief")
        stored: tuple[int, ...] = ()
        for question in ("the cat", "and then", "what of the dog"):
            speak = spelling(model.tokenizer, " the mat and")
            chunks = list(chat.stream(question, max_tokens=40, processors=[speak], speculate=False))
            assert chunks[-1].usage.cached_tokens == len(stored)
            stored = model.stored
        assert model.tokenizer.encode(chat.messages[2]["content"]) != stored[-len(chunks) :], "the tokenizer differs"


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_a_later_turn_of_a_real_model_computes_only_what_is_new(
    real_model: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    questions = ("Tell me about the sea.", "And what of the river \u014ci?", "Thanks!")

    def turns(chat: edgelm.Chat, questions: Sequence[str], stored: Sequence[int]) -> None:
        for number, question in enumerate(questions):
            options: Any = {"max_tokens": 24, "temperature": 1.6, "seed": len(question)}
            usage = list(chat.stream(question, **options))[-1].usage
            assert usage.cached_tokens == len(stored), number
            stored = model.stored

    options: Any = {"backend": need("llamacpp")}
    with load(real_model(name), **options) as model:
        chat = model.chat("You are a helpful assistant.")
        turns(chat, questions[:2], ())
        stored = model.stored
        assert chat.save(tmp_path / "talk.json") == ""
    with load(real_model(name), **options) as model:
        chat = model.chat()
        assert chat.load(tmp_path / "talk.json") == ""
        turns(chat, questions[2:], stored)
