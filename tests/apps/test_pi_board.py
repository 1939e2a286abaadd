"""What a Raspberry Pi is told from: trees of its kernel, and what its firmware says of heat and supply."""

from __future__ import annotations

from pathlib import Path

import pi_trees
import pytest

from edgelm.errors import ConfigError
from edgelm_apps.pi.board import Flash, flash_under, read_board, warnings
from edgelm_apps.pi.target import find_target
from edgelm_apps.pi.vitals import Throttling, Vitals, parse_throttled, read_vitals


@pytest.mark.parametrize(
    ("model", "generation"),
    [
        (pi_trees.PI5, 5),
        (pi_trees.PI4, 4),
        ("Raspberry Pi 500 Rev 1.0", 5),
        ("Raspberry Pi Compute Module 4 Rev 1.0", 4),
        ("Raspberry Pi Zero 2 W Rev 1.0", None),
    ],
)
def test_boards_are_known_by_their_device_tree(tmp_path: Path, model: str, generation: int | None) -> None:
    board = read_board(pi_trees.board(tmp_path, model))
    assert board is not None
    assert (board.model, board.generation) == (model, generation)
    assert (board.memory_bytes, board.free_bytes) == (4147920 * 1024, 3000000 * 1024)


def test_the_model_is_found_in_sys_too(tmp_path: Path) -> None:
    pi_trees.put(tmp_path / "sys/firmware/devicetree/base/model", pi_trees.PI4 + "\0")
    board = read_board(tmp_path)
    assert board is not None
    assert board.model == pi_trees.PI4


@pytest.mark.parametrize("model", ["", "Radxa ROCK 5B\0"])
def test_other_machines_are_none(tmp_path: Path, model: str) -> None:
    pi_trees.put(tmp_path / "proc/device-tree/model", model)
    assert read_board(tmp_path) is None


def test_drives(tmp_path: Path) -> None:
    sd = flash_under(tmp_path, tmp_path / "1", pi_trees.sd_card(tmp_path / "1"))
    emmc = flash_under(tmp_path, tmp_path / "2", pi_trees.sd_card(tmp_path / "2", "MMC"))
    nvme = flash_under(tmp_path, tmp_path / "3", pi_trees.nvme(tmp_path / "3"))
    fast = flash_under(tmp_path, tmp_path / "4", pi_trees.nvme(tmp_path / "4", "8.0 GT/s PCIe"))
    usb = flash_under(tmp_path, tmp_path / "5", pi_trees.usb_drive(tmp_path / "5"))
    assert str(sd) == "SD card mmcblk0"
    assert str(emmc) == "eMMC mmcblk0"
    assert str(nvme) == "NVMe SSD nvme0n1 on PCIe 2.0 x1"
    assert str(fast) == "NVMe SSD nvme0n1 on PCIe 3.0 x1"
    assert str(usb) == "USB drive sda on USB at 5000 Mbit/s"


def test_a_folder_without_a_drive_is_said_so(tmp_path: Path) -> None:
    found = flash_under(tmp_path / "not" / "yet", tmp_path)
    assert found == Flash("a file system without a drive of its own", None, None)


def test_vitals(tmp_path: Path) -> None:
    pi_trees.board(tmp_path, celsius=81.5, throttled="50005")
    pi_trees.put(tmp_path / "sys/class/thermal/thermal_zone1/type", "nvme\n")
    pi_trees.put(tmp_path / "sys/class/thermal/thermal_zone1/temp", "40000\n")
    vitals = read_vitals(tmp_path)
    assert vitals.celsius == 81.5
    assert vitals.throttling == Throttling(("under-voltage", "throttled"), ("under-voltage", "throttled"))
    assert vitals.segments() == ["82 °C", "under-voltage, throttled now"]
    assert "5 V at 5 A" in str(vitals.throttling.advice)


def test_a_machine_that_tells_nothing_has_no_vitals(tmp_path: Path) -> None:
    assert read_vitals(tmp_path) == Vitals(None, None)
    assert Vitals(None, None).segments() == []


@pytest.mark.parametrize(
    ("text", "said", "advice"),
    [
        ("throttled=0x0\n", "not throttled", None),
        ("throttled=0x80000", "not throttled (before: soft temperature limit)", "the board gets hot"),
        ("0x8", "soft temperature limit now", "the board gets hot"),
        ("throttled=0x10000", "not throttled (before: under-voltage)", "the supply is too weak"),
    ],
)
def test_throttling_is_read_bit_by_bit(text: str, said: str, advice: str | None) -> None:
    found = parse_throttled(text)
    assert found is not None
    assert str(found) == said
    assert (found.advice or "").startswith(advice or "")
    assert (found.advice is None) == (advice is None)


def test_what_is_no_number_says_nothing() -> None:
    assert parse_throttled("error=1 error_msg=...") is None


def test_missing_memory_limits_are_a_warning(tmp_path: Path) -> None:
    assert warnings(pi_trees.board(tmp_path / "1")) == []
    (warning,) = warnings(pi_trees.board(tmp_path / "2", limits=False))
    assert "cgroup_enable=memory" in warning


def test_half_of_what_is_free_may_be_taken(tmp_path: Path) -> None:
    target = find_target(None, tmp_path, pi_trees.board(tmp_path))
    assert target.spare_bytes == 3000000 * 1024 // 2
    assert target.name == "Raspberry Pi 5 Model B"
    assert target.facts()["simulated"] is None
    assert "simulated" not in " ".join(target.lines())


def test_elsewhere_a_sentence_names_what_can_be_simulated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"this is not a Raspberry Pi; --simulate pi5-nvme shows .*pi4-sd"):
        find_target(None, tmp_path, tmp_path)


def test_a_simulated_board_says_so_and_what_is_not_simulated(tmp_path: Path) -> None:
    target = find_target("pi4-sd", tmp_path, tmp_path)
    assert target.name == "simulated pi4-sd"
    assert target.facts()["simulated"] == "pi4-sd"
    assert "heat" in target.facts()["not_simulated"]
    assert any("not simulated" in line for line in target.lines())
