"""The service of the user: a unit that systemd accepts, its budget as the limit, and no file of others touched."""

from __future__ import annotations

import configparser
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

from edgelm_apps.pi import service

Command = Callable[..., Result]


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    return tmp_path / "home/.config/systemd/user/edgelm-serve.service"


@pytest.fixture(autouse=True)
def systemctl(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let no test talk to the systemd of this machine; what would be run is returned."""
    asked: list[list[str]] = []
    original = shutil.which
    monkeypatch.setattr(service.shutil, "which", lambda name: "systemctl" if name == "systemctl" else original(name))
    run = service._run

    def noted(argv: list[str], environment: dict[str, str]) -> object:
        if argv[0] == "systemctl":
            asked.append(argv)
            return None
        return run(argv, environment)

    monkeypatch.setattr(service, "_run", noted)
    return asked


def parsed(text: str) -> configparser.ConfigParser:
    found = configparser.ConfigParser(interpolation=None)
    found.optionxform = str  # type: ignore[assignment,method-assign]
    found.read_string(text)
    return found


def test_print_writes_nothing(edgelm_command: Command, unit: Path) -> None:
    done = edgelm_command("pi", "service", "--print", "--memory", "150MB", "--context", "1024")
    assert done.code == 0
    assert not unit.exists()
    found = parsed(done.out)
    assert found["Service"]["MemoryMax"] == str(150_000_000 + service.MARGIN_BYTES)
    assert found["Service"]["Restart"] == "on-failure"
    assert found["Install"]["WantedBy"] == "default.target"
    words = shlex.split(found["Service"]["ExecStart"])
    assert words[:5] == [sys.executable, "-m", "edgelm_apps.cli", "serve", "smollm2-135m-instruct"]
    assert words[words.index("--memory") + 1] == "150000000"
    assert words[words.index("--context") + 1] == "1024"


def test_written_and_removed(edgelm_command: Command, unit: Path, model_file: str, systemctl: list[list[str]]) -> None:
    done = edgelm_command("pi", "service", model_file)
    assert done.code == 0, done.err
    assert str(Path(model_file).resolve()) in unit.read_text()
    assert "systemctl --user daemon-reload && systemctl --user enable --now edgelm-serve.service" in done.err
    assert edgelm_command("pi", "service", model_file, "--memory", "200MB").code == 0  # its own may be replaced
    assert edgelm_command("pi", "service", "--uninstall").code == 0
    assert not unit.exists()
    assert systemctl == [["systemctl", "--user", "disable", "--now", "edgelm-serve.service"]]
    assert "nothing to remove" in edgelm_command("pi", "service", "--uninstall").err


@pytest.mark.parametrize("words", [(), ("--uninstall",)])
def test_a_file_of_somebody_else_is_left_alone(edgelm_command: Command, unit: Path, words: tuple[str, ...]) -> None:
    unit.parent.mkdir(parents=True)
    unit.write_text("[Unit]\nDescription=mine\n")
    done = edgelm_command("pi", "service", *words)
    assert done.code == 2
    assert "not of edgelm's making" in done.err
    assert unit.read_text() == "[Unit]\nDescription=mine\n"


def test_without_the_server_there_is_no_service(
    edgelm_command: Command, unit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "find_spec", lambda name: None)
    done = edgelm_command("pi", "service")
    assert done.code == 2
    assert "pip install 'edgelm[serve]'" in done.err
    assert not unit.exists()


def test_environment_that_a_shell_exports_is_kept() -> None:
    text = service.unit_text("model", {}, 10**8, {"EDGELM_CACHE": "/mnt/ssd drive", "HOME": "/home/pi"})
    assert 'Environment="EDGELM_CACHE=/mnt/ssd drive"' in text
    assert "HOME" not in text


@pytest.mark.parametrize(
    ("word", "written"),
    [
        ("plain-1.0_x/y", "plain-1.0_x/y"),
        ("two words", '"two words"'),
        ("100%", '"100%%"'),
        ('a "quote"', '"a \\"quote\\""'),
        ("$HOME", '"$$HOME"'),
        ("back\\slash", '"back\\\\slash"'),
    ],
)
def test_nothing_in_a_word_is_replaced_by_systemd(word: str, written: str) -> None:
    assert service.quoted(word) == written


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")
def test_systemd_accepts_the_unit_and_would_say_if_not(tmp_path: Path) -> None:
    model = tmp_path / 'odd $name 100% "of" it.gguf'
    good, bad = tmp_path / service.NAME, tmp_path / "bad" / service.NAME
    text = service.unit_text(str(model), {"port": 8080}, 10**8, {})
    good.write_text(text)
    assert service.verify(good) == "systemd finds nothing wrong with it"
    bad.parent.mkdir()
    bad.write_text(text.replace("Restart=on-failure", "Restart=perhaps"))
    assert service.verify(bad).startswith("systemd says: ")
    assert "perhaps" in service.verify(bad)


def test_without_systemd_the_unit_is_not_called_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.shutil, "which", lambda name: None)
    assert service.verify(tmp_path / "unit") == "not verified: there is no systemd-analyze here"
