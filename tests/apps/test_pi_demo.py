"""The demo: one command prepares and talks, goes on where it was broken off, and says what is simulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_engine
import pi_trees
import pytest
from conftest import Result

from edgelm.errors import EdgeLMError
from edgelm.testing import tiny_model
from edgelm_apps.pi import asking, preparing, target
from edgelm_apps.pi.demo import Status
from edgelm_apps.pi.target import find_target
from edgelm_apps.terminal import status as terminal_status

Command = Callable[..., Result]
OPTIONS = ("--backend", "numpy", "--context", "128", "--threads", "1")
SIMULATED = ("--simulate", "pi5-nvme", *OPTIONS)
TALK = ("--memory", "1GB", "--system", "Be brief.")  # the process of the tests is larger than that of the demo


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama")


@pytest.fixture
def on_a_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this machine look like a Raspberry Pi 5."""
    root, original = pi_trees.board(tmp_path / "root"), target.find_target
    monkeypatch.setattr(target, "find_target", lambda simulate, folder: original(simulate, folder, root))
    return root


def test_elsewhere_the_demo_is_refused_before_anything_is_fetched(edgelm_command: Command) -> None:
    done = edgelm_command("pi", "demo")
    assert done.code == 2
    assert "this is not a Raspberry Pi" in done.err
    assert "pulling" not in done.err


def test_prepared_is_prepared(edgelm_command: Command, tiny: Path) -> None:
    first = edgelm_command("pi", "prepare", str(tiny), *SIMULATED, "--json")
    facts = first.json()
    assert first.code == 0, first.err
    assert facts["simulated"] == facts["measured"]["simulated"] == "pi5-nvme"
    assert facts["flash"] == {"bytes_per_s": 450_000_000, "simulated": True, "said": "450 MB/s, simulated"}
    assert facts["budget"]["said"].endswith("room for everything (2 GB can be spared, simulated)")
    assert facts["pack"]["path"] is None
    assert facts["measured"]["decode_tps"] > 0
    assert 0 < facts["measured"]["peak_bytes"] <= facts["budget"]["bytes"]
    assert "done before" not in first.err
    again = edgelm_command("pi", "prepare", str(tiny), *SIMULATED, "--json")
    assert again.json() == facts
    assert again.err.count("(done before)") == 5


def test_who_breaks_off_goes_on_from_there(
    edgelm_command: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "_measure", broken)
        assert edgelm_command("pi", "prepare", str(tiny), *SIMULATED).code == 130
    done = edgelm_command("pi", "prepare", str(tiny), *SIMULATED)
    assert done.code == 0
    assert done.err.count("(done before)") == 4


def test_everything_again(edgelm_command: Command, tiny: Path) -> None:
    options = (*SIMULATED, "--memory", "1GB")
    edgelm_command("pi", "prepare", str(tiny), *options)
    done = edgelm_command("pi", "prepare", str(tiny), *options, "--again")
    assert "done before" not in done.err


def test_a_streamed_model_is_packed_if_its_plan_is_no_worse(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """With plans that say so: one that streams, and a pack that reads less."""
    packs = []

    def edgelm_json(command: str, path: Path, *words: str) -> Any:
        if command == "pack":
            packs.append(Path(words[0]))
            packs[-1].write_bytes(b"pack")
            return {}
        speed = 5.0 if path == tiny else speeds["pack"]
        return {"streamed_bytes_per_pass": 66_000_000, "predicted_decode_tps": speed}

    monkeypatch.setattr(preparing, "edgelm_json", edgelm_json)
    speeds = {"pack": 5.06}
    made = preparing._pack(tiny, {})
    assert made["path"] == str(packs[0])
    assert made["said"] == (
        "made, since 66 MB are read from flash for each token: in its order, and checked on the way; "
        "5 tok/s predicted with the file, 5.06 with the pack"
    )
    speeds["pack"] = 4.0
    assert preparing._pack(tiny, {}) == {
        "path": None,
        "said": "not kept, 5 tok/s predicted with the file, 4 with the pack",
    }
    assert not packs[-1].exists()


def test_no_pack_where_there_is_no_room(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert str(preparing._no_pack(tiny, 1000)).endswith("of flash and 1 kB are free")


def test_a_step_that_fails_says_why_and_keeps_its_exit_code(edgelm_command: Command, tiny: Path) -> None:
    done = edgelm_command("pi", "prepare", str(tiny), *SIMULATED, "--memory", "1MB")
    assert done.code == 6
    assert "budget 1 MB is too small" in done.err
    assert "Traceback" not in done.err
    with pytest.raises(EdgeLMError, match="no-such-file"):
        asking.edgelm_json("plan", "no-such-file.gguf")


def test_the_demo_talks_and_says_how_the_board_is(
    edgelm_command: Command, tiny: Path, on_a_board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pi_trees.put(on_a_board / "sys/devices/platform/soc/soc:firmware/get_throttled", "50000\n")
    monkeypatch.setattr(preparing, "_flash", lambda _: {"said": "88 MB/s measured"})
    done = edgelm_command("pi", "demo", str(tiny), *OPTIONS, *TALK, stdin=b"Hi\nand again\n")
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if " · " in line]
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("Raspberry Pi 5 Model B · ")
        assert line.endswith(" · 52 °C · not throttled (before: under-voltage, throttled)")
        assert " tok/s · " in line
        assert " · flash at rest · " in line
    assert done.err.count("the supply is too weak") == 1
    assert "simulated" not in done.err


def test_a_simulated_demo_says_so_everywhere(edgelm_command: Command, tiny: Path) -> None:
    done = edgelm_command("pi", "demo", str(tiny), *SIMULATED, *TALK, stdin=b"Hi\n")
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if " · " in line]
    assert line.startswith("simulated pi5-nvme · ")
    assert "°C" not in line
    assert "not simulated: the speed of processor and memory, heat and throttling" in done.err


def test_quiet_is_quiet(edgelm_command: Command, tiny: Path) -> None:
    done = edgelm_command("pi", "demo", str(tiny), *SIMULATED, *TALK, "--quiet", stdin=b"Hi\n")
    assert done.code == 0
    assert " · " not in done.err
    assert "board:" not in done.err
    assert done.out.strip()


def test_the_speed_of_the_flash_is_in_the_line(tmp_path: Path) -> None:
    status = Status(find_target(None, tmp_path, pi_trees.board(tmp_path)), print)
    usage: Any = fake_engine.FakeUsage(bytes_streamed=44_000_000, read_s=0.5)
    wanted = "Raspberry Pi 5 Model B · 10.0 tok/s · 80 MB of 100 MB · flash 88 MB/s · 52 °C · not throttled"
    assert status.line(usage) == wanted


def test_the_full_screen_has_the_board_in_its_status_line(tmp_path: Path) -> None:
    told: list[str] = []
    board = Status(find_target(None, tmp_path, pi_trees.board(tmp_path, throttled="4")), told.append)
    usage: Any = fake_engine.FakeUsage()
    now = terminal_status.Status("tiny", "numpy", 100_000_000, "answering", usage=usage, rss_bytes=80_000_000)
    wide = terminal_status.status_text(now, board.segments(), 200)
    assert wide == "10.0 tok/s · Raspberry Pi 5 Model B · 80/100 MB · 52 °C · throttled now · tiny · numpy"
    assert len(terminal_status.status_text(now, board.segments(), 40)) <= 40
    assert told == ["the board gets hot and slows down: give it a heat sink or a fan"]
    simulated = Status(find_target("pi4-sd", tmp_path, tmp_path), told.append)
    assert "simulated pi4-sd" in terminal_status.status_text(now, simulated.segments(), 200)


def test_the_board_is_shown(edgelm_command: Command, on_a_board: Path) -> None:
    done = edgelm_command("pi", "board")
    assert done.code == 0
    assert "board: Raspberry Pi 5 Model B Rev 1.0, 4.25 GB of memory, of which 3.07 GB are free" in done.out
    assert "now: 52 °C, not throttled" in done.out
    facts = edgelm_command("pi", "board", "--json").json()
    assert facts["vitals"]["celsius"] == 52.3
    assert facts["warnings"] == []
    simulated = json.loads(edgelm_command("pi", "board", "--simulate", "pi4-sd", "--json").out)
    assert simulated["simulated"] == "pi4-sd"
    assert simulated["vitals"] == {"celsius": None, "throttling": None}
