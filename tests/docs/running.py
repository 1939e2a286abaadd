"""Runs what the documentation shows, each page in a folder of its own, with a home and a cache that no user has.

Knows what keeps running (`edgelm serve`), what is typed into a chat, and what must be there for a command.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from fences import PYTHON, ROOT, Block, Step
from prepared import lay_out, register

from edgelm_models.catalogue import CATALOGUE, DEFAULT_MODEL

PATIENCE_S = 300.0
NEEDS = {
    r"--backend \S*llamacpp|--against llama\.cpp": "llama_cpp",
    r"--backend \S*mlx": "mlx",
    r"edgelm profile": "plotly",
    r"edgelm serve": "starlette",
    r"--json-schema|--regex|--grammar|json_schema=": "llguidance",
    r"from openai|import openai": "openai",
}
EXAMPLE = ROOT / "docs/example_backend/edgelm_einsum"
TYPED = "Hi\n/stats\n"
"""What is said to `edgelm chat`."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


def real_models(text: str) -> set[str]:
    """Return the models of the catalogue that a command names, or means by naming none."""
    named = {name for name in CATALOGUE if name in text}
    return named | ({DEFAULT_MODEL} if re.search(r"edgelm chat\s*($|[-#])", text) else set())


def lacking(text: str, needs: str) -> list[str]:
    """Return which modules and programs are not here that a command or a script needs."""
    names = [module for pattern, module in NEEDS.items() if re.search(pattern, text)]
    names += [name for name in re.split(r",\s*", needs) if name]
    return [name for name in names if importlib.util.find_spec(name) is None and shutil.which(name) is None]


class Sandbox:
    """A home, a cache and a path for commands, and a folder for each page."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self._folder = folder
        self._pages: dict[str, PlaceOfPage] = {}
        self.environment = self._environment(models)

    def place(self, block: Block) -> PlaceOfPage:
        """Return the place of a block's page, with the files that the page speaks of."""
        if block.page not in self._pages:
            place = self._folder / block.page
            place.mkdir()
            page = next(path for path in (ROOT / block.page, ROOT / "docs" / block.page) if path.exists())
            text = page.read_text(encoding="utf-8")
            lay_out(block.page, text, place)
            more = {}
            if EXAMPLE.name in text:
                _install_example(place / ".installed")
                more["PYTHONPATH"] = os.pathsep.join([str(place / ".installed"), self.environment["PYTHONPATH"]])
            self._pages[block.page] = PlaceOfPage(place, self.environment | more)
        return self._pages[block.page]

    def close(self) -> None:
        for page in self._pages.values():
            page.close()

    def _environment(self, models: dict[str, Path]) -> dict[str, str]:
        programs, home = self._folder / "bin", self._folder / "home"
        for folder in (programs, home):
            folder.mkdir()
        for name, arguments in (("edgelm", "-m edgelm_apps.cli"), ("python", ""), ("python3", "")):
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
            program.chmod(0o755)
        register(home / "cache", models)
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("EDGELM_", "HF_", "XDG_", "PIP_")) and not name.lower().endswith("_proxy")
        }
        return inherited | {
            "HOME": str(home),
            "EDGELM_CACHE": str(home / "cache"),
            # programs of this environment are found without its being activated
            "PATH": os.pathsep.join(
                [str(programs), str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)]
            ),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PIP_NO_INDEX": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }


class PlaceOfPage:
    """Runs the commands and scripts of one page, in order, in its folder."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._servers: list[subprocess.Popen[bytes]] = []
        self._ports: dict[str, str] = {}
        """The ports that the page writes, and the free ones that stand in for them."""

    def run(self, step: Step) -> Done:
        if step.block.language in PYTHON:
            path = self._folder / "block.py"
            path.write_text(self._here(step.first + step.text), encoding="utf-8")
            return self._done([sys.executable, str(path)])
        if step.text.startswith("edgelm serve"):
            return self._serve(step)
        if step.text.startswith("cat ") and step.shown:
            self._write(step.text.split()[1], step.shown)
        text = self._here(_shortened(step.text, step.block.said.get("run with", "")))
        script = f"set -euo pipefail\n{step.first}{text}\n"
        return self._done(["bash", "-c", script], TYPED if step.text.startswith("edgelm chat") else "")

    def close(self) -> None:
        """Stop the servers as a user does; each must end well."""
        for server in self._servers:
            server.send_signal(signal.SIGINT)
        codes = [server.wait(30) for server in self._servers]
        assert not any(codes), f"servers that were interrupted ended with {codes}"

    def _done(self, argv: list[str], typed: str = "") -> Done:
        done = subprocess.run(
            argv,
            input=typed,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            cwd=self._folder,
            env=self._environment,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def _serve(self, command: Step) -> Done:
        """Start a server on a free port and leave it running for the blocks that follow."""
        stated = re.search(r"--port (\d+)", command.text)
        port = str(_free_port())
        self._ports[stated[1] if stated else "8080"] = port
        text = self._here(re.sub(r"\s+--port \d+", "", command.text).partition("  #")[0]) + f" --port {port}"
        log = self._folder / f"server-{port}.log"
        with log.open("wb") as out:
            script = f"{command.first}exec {text}"
            server = subprocess.Popen(
                ["bash", "-c", script], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self._folder,
                env=self._environment,
            )  # fmt: skip
        self._servers.append(server)
        end = time.monotonic() + PATIENCE_S
        while server.poll() is None and not _answers(port):
            assert time.monotonic() < end, f"the server does not answer: {log.read_text()}"
            time.sleep(0.05)
        if server.poll() is not None:
            self._servers.remove(server)
        return Done(server.returncode or 0, "", log.read_text())

    def _here(self, text: str) -> str:
        for stated, port in self._ports.items():
            text = re.sub(rf"(?<=:){stated}\b", port, text)
        return text

    def _write(self, name: str, shown: tuple[str, ...]) -> None:
        """A file that the page shows with `cat` is the one that it shows."""
        (self._folder / name).write_text("\n".join(shown) + "\n", encoding="utf-8")


def _install_example(folder: Path) -> None:
    """Put the documentation's backend where Python and its entry points are looked for, as pip would."""
    about = folder / "edgelm_einsum-1.0.dist-info"
    about.mkdir(parents=True)
    (folder / EXAMPLE.name).symlink_to(EXAMPLE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: edgelm-einsum\nVersion: 1.0\n")
    points = tomllib.loads((EXAMPLE.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {what}\n" for name, what in ones.items()) for group, ones in points.items()
    ]
    (about / "entry_points.txt").write_text("\n".join(lines))


def _shortened(text: str, options: str) -> str:
    """Add the options that are for such a command, as in `bench = -r 1; verify = --positions 64`."""
    for beginning, _, added in (one.partition(" = ") for one in options.split(";")):
        if added and text.startswith(f"edgelm {beginning.strip()}"):
            return f"{text.partition(' #')[0].rstrip()} {added.strip()}"
    return text


def _answers(port: str) -> bool:
    """Say whether a server is there; one that asks for a key is."""
    ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    try:
        ask(f"http://127.0.0.1:{port}/health", timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code == 401
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
