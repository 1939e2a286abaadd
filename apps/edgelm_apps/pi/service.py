"""A systemd unit of the user that serves a model from the start of the board; asks for no root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from edgelm_apps.pi.asking import options as options_of

NAME = "edgelm-serve.service"
MARK = "# Written by `edgelm pi service`, which also removes it: `edgelm pi service --uninstall`."
MARGIN_BYTES = 64 * 10**6
"""What the kernel may count beside the budget: page tables, sockets, and files that it reads ahead."""
PATIENCE_S = 30.0
_KEPT = ("EDGELM_CACHE", "EDGELM_GGML")
"""Variables that a service would miss: it does not see what a shell exports."""


def unit_text(model: str, options: Mapping[str, object], budget_bytes: int, environment: Mapping[str, str]) -> str:
    """Return the unit that serves `model`; `options` are those of `edgelm serve`."""
    from edgelm.sizes import human

    command = [sys.executable, "-m", "edgelm_apps.cli", "serve", model, "--memory", str(budget_bytes), "--quiet"]
    command += options_of(options)
    kept = [f"Environment={quoted(f'{name}={environment[name]}')}" for name in _KEPT if environment.get(name)]
    return "\n".join(
        [
            MARK,
            "[Unit]",
            f"Description=edgelm serves {plain(model)} in {human(budget_bytes)} of memory",
            "",
            "[Service]",
            f"ExecStart={' '.join(map(quoted, command))}",
            *kept,
            "Restart=on-failure",
            "RestartSec=5",
            f"# the budget of {human(budget_bytes)} and {human(MARGIN_BYTES)} for what the kernel counts beside it",
            f"MemoryMax={budget_bytes + MARGIN_BYTES}",
            "NoNewPrivileges=true",
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
    )


def quoted(word: str) -> str:
    """Return a word as a unit file takes it: in quotes, with nothing in it that systemd would replace."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or any(letter.isspace() or letter in "';" for letter in word) else word


def plain(text: str) -> str:
    """Return a text as a description takes it: on one line, nothing replaced."""
    return " ".join(text.replace("%", "%%").split())


def unit_path() -> Path:
    """Return where systemd looks for units of the user."""
    from platformdirs import user_config_path

    return user_config_path("systemd", appauthor=False) / "user" / NAME


def install(text: str) -> tuple[Path, str]:
    """Write the unit; return its place and what systemd says of it.

    Raises `ConfigError` if it could not start, or would replace a file that is somebody else's.
    """
    from edgelm.errors import ConfigError

    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ConfigError("the server that is to be started is not installed; run: pip install 'edgelm[serve]'")
    path = unit_path()
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise ConfigError(f"{path} is not of edgelm's making; remove it, or give it another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path, verify(path)


def verify(path: Path) -> str:
    """Return what `systemd-analyze` says of a unit, in a sentence."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return "not verified: there is no systemd-analyze here"
    with tempfile.TemporaryDirectory() as folder:  # what a session of a user has, and a container has not
        environment = {"XDG_RUNTIME_DIR": folder, **os.environ, "SYSTEMD_LOG_COLOR": "0"}
        done = _run([program, "verify", "--user", "--man=no", str(path)], environment)
    said = done.stderr.strip().splitlines()
    own = [line for line in said if path.name in line]
    if done.returncode == 0 and not own:
        return "systemd finds nothing wrong with it"
    return f"systemd says: {'; '.join(own)}" if own else f"not verified: {'; '.join(said)}"


def uninstall() -> Path | None:
    """Stop the service and remove its unit; return its place, None if there was none."""
    from edgelm.errors import ConfigError

    path = unit_path()
    if not path.exists():
        return None
    if not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        raise ConfigError(f"{path} is not of edgelm's making; remove it yourself if it is to go")
    if (program := shutil.which("systemctl")) is not None:
        _run([program, "--user", "disable", "--now", NAME], dict(os.environ))
    path.unlink()
    return path


def _run(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, env=environment)
