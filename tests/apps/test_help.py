"""Helps end with what works, and starting costs few modules: counted, since seconds vary with the machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import pytest

from edgelm_apps.cli import COMMANDS, cli
from edgelm_apps.help_ends import ENDS, EXIT_CODES, VARIABLES

ROOT = Path(__file__).resolve().parents[2]
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
HEAVY = {
    "asyncio", "concurrent.futures", "email", "filelock", "huggingface_hub", "importlib.metadata", "jinja2",
    "llama_cpp", "llguidance", "mlx", "msgspec", "multiprocessing", "numpy", "onnx", "onnxruntime", "pkg_resources",
    "platformdirs", "plotly", "psutil", "ssl", "starlette", "tempfile", "tokenizers", "tqdm", "urllib.request",
    "uvicorn", "xxhash",
}  # fmt: skip
STARTS = {  # modules beyond those of the interpreter; raised only on purpose
    "import edgelm": 45,
    "--version": 95,
    "--help": 130,
    "chat --help": 110,
    "run --help": 115,
    "serve --help": 115,
    "completion bash": 110,
}


def loaded(start: str) -> set[str]:
    """Return the modules that a start imports."""
    run = start if start.startswith("import") else f"from edgelm_apps.cli import main; main({start.split()!r})"
    code = f"import sys; before = set(sys.modules); {run}; print('\\nLOADED', *(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.partition("\nLOADED")[2].split())


@pytest.mark.parametrize("start", STARTS)
def test_a_start_imports_little(start: str) -> None:
    modules = loaded(start)
    assert not modules & HEAVY
    assert len(modules) <= STARTS[start], sorted(modules)


def test_the_count_sees_what_is_imported() -> None:
    assert "asyncio" in loaded("import asyncio")


def commands_of(example: str) -> list[list[str]]:
    """Return the words of every `edgelm` command of a line that a shell would run."""
    inner = re.findall(r"\$\(([^)]*)\)", example)
    found = []
    for line in inner or [example]:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;")
        lexer.whitespace_split = True
        words = list(lexer)
        for cut in [at for at, word in enumerate(words) if set(word) <= set("|<>;")][:1]:
            words = words[cut + 1 :] if words[0] != "edgelm" else words[:cut]
        found.append(words)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_ends_with_examples_that_work(name: str) -> None:
    examples, codes, variables = ENDS[name]
    parent = click.Context(cli, info_name="edgelm", **cli.context_settings)
    called = [words for example in examples for words in commands_of(example)]
    assert called
    for program, command, *rest in called:
        assert program == "edgelm"
        found = cli.get_command(parent, command)
        assert found is not None
        with suppress(click.exceptions.Exit):
            found.make_context(command, rest, parent=parent)
    assert f"edgelm {name}" in " ".join(examples)
    assert set(codes) <= EXIT_CODES.keys()
    assert set(variables) <= VARIABLES.keys()


def test_the_ends_say_what_the_documentation_says() -> None:
    documented = set(map(int, re.findall(r"^\| (\d+) \|", CLI_PAGE, re.M)))
    assert EXIT_CODES.keys() <= documented
    assert ENDS.keys() == COMMANDS.keys()
    sources = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("edgelm", "backends", "models", "apps")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "help_ends.py"
    )
    assert not {name for name in VARIABLES if name not in sources}
    assert set(re.findall(r"EDGELM_[A-Z_]+", sources)) - VARIABLES.keys() <= {
        "EDGELM_COMPLETE",
        "EDGELM_FREEZE",
    }  # of shells, and of PyInstaller


def test_a_help_shows_its_end() -> None:
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        shown = command.get_help(click.Context(command, info_name=name))
        assert "Examples:" in shown
        assert "Exit codes: 0 done" in shown
