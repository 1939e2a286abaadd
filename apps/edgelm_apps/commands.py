"""The slash commands of the chat: what each is called, does, and can be completed with.

One implementation for lines and screen. Knows the conversation and a voice, no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelm_apps.engine import statistics_text

if TYPE_CHECKING:
    from edgelm_apps.conversation import Conversation, Voice


class Leave(Exception):
    """The user leaves the chat."""


@dataclass(frozen=True, slots=True)
class Command:
    """`run(conversation, rest of the line, voice)` obeys it; `values()` are what its argument is completed with.

    `usages` are its lines in the help. `at_once`: it need not wait for an answer that streams.
    """

    run: Callable[[Conversation, str, Voice], None]
    usages: Mapping[str, str]
    values: Callable[[], Sequence[str]] = tuple
    at_once: bool = False


def respond(conversation: Conversation, text: str, voice: Voice) -> bool:
    """Obey a slash command or answer a message; return False when the user leaves."""
    name, _, rest = text.strip().partition(" ")
    if not name.startswith("/"):
        if text.strip():
            conversation.answer(text, voice)
        return True
    command = commands_of(voice).get(name)
    if command is None:
        voice.note(f"unknown command {name}; /help lists the commands")
        return True
    try:
        command.run(conversation, rest.strip(), voice)
    except Leave:
        return False
    return True


def commands_of(voice: Voice) -> dict[str, Command]:
    """Return every command by its name, in the order of the help."""
    return {**COMMANDS, **voice.commands, "/exit": EXIT, "/quit": EXIT}


def help_text(voice: Voice) -> str:
    lines = {usage: text for command in commands_of(voice).values() for usage, text in command.usages.items()}
    width = max(map(len, lines)) + 2
    return "\n".join([*(f"{usage.ljust(width)}{text}" for usage, text in lines.items()), voice.keys])


def _help(conversation: Conversation, rest: str, voice: Voice) -> None:
    voice.say(help_text(voice))


def _system(conversation: Conversation, rest: str, voice: Voice) -> None:
    if rest:
        conversation.restart(rest)
        voice.note("a new conversation begins with this system message")
    else:
        system = conversation.system
        voice.note(f"system message: {system}" if system else "there is no system message")


def _retry(conversation: Conversation, rest: str, voice: Voice) -> None:
    try:
        temperature = float(rest) if rest else None
    except ValueError:
        voice.note(f"/retry takes a temperature such as 0.8, or nothing, not {rest!r}")
        return
    conversation.retry(voice, temperature)


def _save(conversation: Conversation, rest: str, voice: Voice) -> None:
    if not rest:
        _ask_for_name("/save", voice)
        return
    path = chats_folder() / f"{plain_name(rest)}.json"
    told = conversation.chat.save(path)
    voice.note(f"saved in {path}" + (f"; {told}" if told else ""))


def _load(conversation: Conversation, rest: str, voice: Voice) -> None:
    if not rest:
        _ask_for_name("/load", voice)
        return
    told = conversation.chat.load(chats_folder() / f"{plain_name(rest)}.json")
    n_messages = len(conversation.chat.messages)
    voice.note(f"{n_messages} messages are back; {told or 'nothing has to be computed again'}")


def _ask_for_name(name: str, voice: Voice) -> None:
    names = saved_names()
    voice.note(f"{name} takes a name" + (f"; saved are {', '.join(names)}" if names else ""))


def _stats(conversation: Conversation, rest: str, voice: Voice) -> None:
    if not rest:
        voice.say(statistics_text(conversation.usage) if conversation.usage else "no answer yet")
    elif rest in ("on", "off"):
        conversation.shows_status = rest == "on"
        voice.note("a line of statistics follows each answer" if conversation.shows_status else "no more statistics")
    else:
        voice.note(f"/stats takes on, off or nothing, not {rest!r}")


def _clear(conversation: Conversation, rest: str, voice: Voice) -> None:
    conversation.chat.clear()
    voice.note("the conversation is forgotten")


def _budget(conversation: Conversation, rest: str, voice: Voice) -> None:
    if not rest:
        voice.say(str(conversation.model.plan))
        return
    for line in conversation.set_budget(rest):
        voice.note(line)


def _exit(conversation: Conversation, rest: str, voice: Voice) -> None:
    raise Leave


def plain_name(name: str) -> str:
    """Return a name that is no path. Raises `ConfigError` for one that says nothing."""
    from edgelm.errors import ConfigError

    kept = "".join(letter for letter in name.strip() if letter.isalnum() or letter in "-_. ").strip(". ")
    if not kept:
        raise ConfigError(f"{name.strip()!r} is no name; use letters and digits")
    return kept


def chats_folder() -> Path:
    """Return where saved conversations are: the user's data folder."""
    from platformdirs import user_data_path

    return user_data_path("edgelm", appauthor=False) / "chats"


def saved_names() -> list[str]:
    return sorted(path.stem for path in chats_folder().glob("*.json"))


COMMANDS = {
    "/help": Command(_help, {"/help": "this list"}, at_once=True),
    "/system": Command(_system, {"/system TEXT": "start over with TEXT as the system message; /system alone shows it"}),
    "/retry": Command(
        _retry, {"/retry": "answer the last message again, in other words; /retry 1.2 sets the temperature of it"}
    ),
    "/save": Command(
        _save,
        {"/save NAME": "keep this conversation, with what is computed of it; /load NAME goes on with it"},
        saved_names,
    ),
    "/load": Command(_load, {}, saved_names),
    "/stats": Command(
        _stats,
        {
            "/stats": "tokens, speed, time and memory of the last answer",
            "/stats on|off": "show a line of it after each answer",
        },
        lambda: ("on", "off"),
        at_once=True,
    ),
    "/clear": Command(_clear, {"/clear": "forget the conversation"}),
    "/budget": Command(
        _budget,
        {"/budget SIZE": "go over to another memory budget, such as 200MB; the conversation goes on"},
        at_once=True,
    ),
}
EXIT = Command(_exit, {"/exit": "leave (Ctrl-D does it too)"}, at_once=True)
