"""Reference and troubleshooting are complete: every public name, error and exit code, and messages that exist."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache

import pytest
from fences import ROOT
from messages import GAP, texts

import edgelm
import edgelm.aio
import edgelm.errors
import edgelm.sizes
from edgelm.errors import EdgeLMError
from edgelm_apps import cli

TROUBLE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
COMMAND_LINE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
API = (ROOT / "docs/api.md").read_text(encoding="utf-8")
HEAVY = ("edgelm.testing", "edgelm_apps.server", "edgelm_apps.peer")
"""Modules that import much, and define no error."""
WHOLE = {"edgelm.errors", "edgelm.aio", "edgelm.sizes"}
"""Modules of which the page shows all that is public."""


def test_every_public_name_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", API, re.MULTILINE))
    assert shown >= WHOLE
    errors = {name for name in edgelm.__all__ if getattr(edgelm, name).__module__ == "edgelm.errors"}
    assert {f"edgelm.{name}" for name in edgelm.__all__ if name not in errors} == shown - WHOLE


@cache
def _all_errors() -> tuple[type[EdgeLMError], ...]:
    """Return every class of the tree, also those of modules that are seldom imported."""
    for package in ("edgelm", "edgelm_apps", "edgelm_models"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            if not module.name.startswith(HEAVY):
                importlib.import_module(module.name)
    found = [EdgeLMError]
    for one in found:
        found += [kind for kind in one.__subclasses__() if kind.__module__.startswith("edgelm")]
    return tuple(found)


def test_every_error_is_explained() -> None:
    missing = [kind.__name__ for kind in _all_errors() if f"`{kind.__name__}`" not in TROUBLE]
    warnings = [
        name for name, kind in vars(edgelm.errors).items() if inspect.isclass(kind) and issubclass(kind, Warning)
    ]
    assert not missing + [name for name in warnings if f"`{name}`" not in TROUBLE]


def test_every_exit_code_is_explained() -> None:
    section = COMMAND_LINE.partition("## Exit codes")[2].partition("\n## ")[0]
    documented, explained = (
        {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
        for text in (section, TROUBLE.partition("## By exit code")[2].partition("\n## ")[0])
    )
    raised = {kind.exit_code for kind in _all_errors()} | {cli.EXIT_INTERRUPTED, cli.EXIT_BROKEN_PIPE, 0}
    assert documented == explained
    assert raised <= documented


def _quoted() -> Iterator[str]:
    """Yield the messages of the tables: the code at the beginning of a row, in which there may be code again."""
    for row in re.findall(r"^\| (`.*)$", TROUBLE, re.MULTILINE):
        cell = row.split(" | ")[0].strip()
        yield cell.strip("`").strip() if cell.startswith("`` ") else cell[1:-1]


@pytest.mark.parametrize("message", list(_quoted()))
def test_quoted_messages_are_in_the_source(message: str) -> None:
    """A gap in the page may stand for whatever the source puts there."""
    pieces = [re.escape(piece) for piece in message.split(GAP)]
    pattern = re.compile(".*?".join(pieces))
    assert any(pattern.search(text) for text in texts()), f"no text of the source is like {message!r}"
