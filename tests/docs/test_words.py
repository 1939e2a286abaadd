"""The documents are true where a program can tell: links lead somewhere, commands exist, Python code compiles."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest
from fences import BLOCKS, PAGES, PYTHON, SHELL, STEPS, Block, Step

from edgelm.testing.backend_contract import BackendContract
from edgelm_apps.cli import cli

OPERATORS = {"|", "||", "&&", ";", ">", ">>", "<", "2>"}


def edgelm_commands(step: Step) -> Iterator[list[str]]:
    """Yield the words of every `edgelm` command in a line of a shell."""
    command: list[str] = []
    for word in [*shlex.split(step.text.replace("\\\n", " "), comments=True), ";"]:
        if word not in OPERATORS:
            command.append(word)
            continue
        if command[:1] == ["edgelm"]:
            yield command
        command = []


COMMANDS = [(step, command) for step in STEPS if step.block.language in SHELL for command in edgelm_commands(step)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links to {target}"


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=lambda number: str(COMMANDS[number][0]))
def test_commands_exist(number: int) -> None:
    name, *rest = COMMANDS[number][1][1:]
    parent = click.Context(cli, info_name="edgelm", **cli.context_settings)
    with suppress(click.exceptions.Exit):  # --help, --version
        if name.startswith("-"):
            cli.make_context("edgelm", [name, *rest])
            return
        command = cli.get_command(parent, name)
        assert command is not None, f"there is no `edgelm {name}`"
        command.make_context(name, rest, parent=parent)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language in PYTHON], ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


def test_the_backend_of_the_documentation_is_complete() -> None:
    """The example keeps a sample of the contract that it asks others to keep."""
    code = next(block.text for block in BLOCKS if block.page == "backends.md" and "BACKEND =" in block.text)
    names: dict[str, object] = {}
    exec(compile(code, "docs/backends.md", "exec"), names)
    backend = names["BACKEND"]
    contract = BackendContract()
    contract.test_probe_finds_the_backend(backend)  # type: ignore[arg-type]
    session = backend.open(1)  # type: ignore[attr-defined]
    contract.test_inputs_are_left_alone(backend, session)  # type: ignore[arg-type]
    contract.test_abort_stops_programs_until_it_is_taken_back(backend, session)  # type: ignore[arg-type]
    session.close()
