"""`/save` and `/load` in the chat, with a real tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import edgelm
from edgelm.errors import ConfigError
from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm_apps import commands
from edgelm_apps.conversation import Conversation
from edgelm_apps.output import Asides
from edgelm_apps.repl import Printer


def respond(talk: Conversation, line: str) -> bool:
    return commands.respond(talk, line, Printer(talk.model))


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_rates: None) -> Iterator[Conversation]:
    monkeypatch.setattr(commands, "chats_folder", lambda: tmp_path / "chats")
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384, head_dim=32)
    with edgelm.load(path, memory=GB, backend="numpy", threads=1, context=256) as model:
        yield Conversation(model, "be brief", "error", {"max_tokens": 4, "ignore_eos": True}, Asides(quiet=True))


def test_a_conversation_is_saved_by_name_and_goes_on(
    talk: Conversation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in ("/load talk", "/save", "/save ../..", "/load ?"):
        if line == "/save":
            respond(talk, line)
            assert "/save takes a name" in capsys.readouterr().err
        else:
            with pytest.raises(ConfigError, match=r"is no name|cannot be read"):
                respond(talk, line)
    for line in ("the cat", "/save my talk", "/clear", "/load my talk"):
        assert respond(talk, line)
    told = capsys.readouterr().err
    assert f"saved in {tmp_path / 'chats' / 'my talk.json'}" in told
    assert "3 messages are back; nothing has to be computed again" in told
    respond(talk, "and then")
    assert talk.usage is not None
    assert talk.usage.cached_tokens > 20
    (tmp_path / "chats" / "my talk.json.kv").write_bytes(b"edgelm")
    respond(talk, "/load my talk")
    assert "3 messages are back; the conversation is computed again with its next turn" in capsys.readouterr().err
    respond(talk, "/load")
    assert "saved are my talk" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said(
    talk: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chats").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        respond(talk, "/save talk")


def test_what_is_kept_of_a_system_message_is_said_after_the_answer(
    talk: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edgelm.prefixes.LEAST_S", 0)
    talk.keep = True
    respond(talk, "/system you are a cat and a dog")
    respond(talk, "the cat")
    assert "keys and values are kept in" in capsys.readouterr().err
