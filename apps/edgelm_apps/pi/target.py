"""What the demo runs on: this Raspberry Pi, or one that is simulated on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgelm_apps.pi.board import ROOT, Board, Flash, flash_under, read_board

if TYPE_CHECKING:
    from edgelm import Device

NOT_SIMULATED = "the speed of processor and memory, heat and throttling"
SHARE = 0.5
"""Share of the free memory that the demo takes at the most; the rest is for the system and what else runs on it."""


class Target(NamedTuple):
    """A board, and the flash that models are on. Either `board` or `device`, which is a simulated one, is there."""

    board: Board | None
    device: Device | None
    drive: Flash | None
    spare_bytes: int
    root: Path = ROOT
    """Where the trees of its kernel are."""

    @property
    def name(self) -> str:
        """What it is called in a status line."""
        if self.device is not None:
            return f"simulated {self.device.name}"
        assert self.board is not None
        return self.board.model.partition(" Rev ")[0]

    def facts(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "board": self.board._asdict() if self.board else None,
            "drive": self.drive._asdict() if self.drive else None,
            "spare_bytes": self.spare_bytes,
            "simulated": self.device.name if self.device else None,
            "not_simulated": NOT_SIMULATED if self.device else None,
        }

    def lines(self) -> list[str]:
        """Return it as sentences."""
        from edgelm.sizes import human

        if self.device is not None:
            slow = f"reads at {human(self.device.flash_bytes_per_s)}/s, {self.device.n_threads} threads at the most"
            return [
                f"board: simulated {self.device.name}, {self.device.about}: {slow}",
                f"not simulated: {NOT_SIMULATED} are this machine's own",
            ]
        assert self.board is not None
        return [
            f"board: {self.board.model}, {human(self.board.memory_bytes)} of memory, of which "
            f"{human(self.board.free_bytes)} are free",
            f"models are on: {self.drive}",
        ]


def pi_devices() -> dict[str, Device]:
    """Return the boards that can be simulated, by name."""
    from edgelm import devices

    return {name: device for name, device in devices().items() if name.startswith("pi")}


def find_target(simulate: str | None, folder: Path, root: Path = ROOT) -> Target:
    """Return what the demo runs on; `folder` is where models lie. Raises `ConfigError` where there is no board."""
    from edgelm.errors import ConfigError

    if simulate is not None:
        device = pi_devices()[simulate]
        return Target(None, device, None, device.memory_bytes)
    board = read_board(root)
    if board is None:
        raise ConfigError(
            "this is not a Raspberry Pi; --simulate pi5-nvme shows here what one would do "
            f"(one of {', '.join(pi_devices())})"
        )
    return Target(board, None, flash_under(folder, root), int(board.free_bytes * SHARE), root)
