"""Writes the options section of docs/cli.md from the commands themselves: `python -m edgelm_apps.reference FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from edgelm_apps.cli import cli

BEGIN = "<!-- options: written by python -m edgelm_apps.reference docs/cli.md -->"
END = "<!-- end of options -->"
_WIDTH = 100


def options_section() -> str:
    """Return every command's help as Markdown; the same on every terminal."""
    group = click.Context(cli, info_name="edgelm", terminal_width=_WIDTH, **cli.context_settings)
    sections = [_section("edgelm", cli.get_help(group))]
    for name in cli.list_commands(group):
        command = cli.get_command(group, name)
        assert command is not None
        sections += _sections(f"edgelm {name}", command, click.Context(command, info_name=name, parent=group))
    return "\n\n".join(sections)


def _sections(title: str, command: click.Command, context: click.Context) -> list[str]:
    """Return the help of a command, and of those below it."""
    context.terminal_width = _WIDTH
    found = [_section(title, command.get_help(context))]
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            found += _sections(f"{title} {name}", below, click.Context(below, info_name=name, parent=context))
    return found


def regenerated(page: str) -> str:
    """Return `page` with the text between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{options_section()}\n\n{END}{after}"


def _section(title: str, text: str) -> str:
    return f"### `{title}`\n\n```text\n{text}\n```"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(regenerated(path.read_text(encoding="utf-8")), encoding="utf-8")
