"""The texts of the source: every literal string, with … where a value is put in. What pages quote is looked up here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from fences import ROOT

PACKAGES = ("edgelm", "models", "backends", "apps")
GAP = "…"


@cache
def texts() -> tuple[str, ...]:
    """Return the texts of all modules; those of several pieces are one."""
    return tuple(text for path in _modules() for text in _texts_of(path))


def _modules() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def _texts_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr | ast.BinOp):
            yield _joined(node)


def _joined(node: ast.expr) -> str:
    """Return the text of an f-string, or of strings added up; anything else is a gap."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_joined(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _joined(node.left) + _joined(node.right)
    return GAP
