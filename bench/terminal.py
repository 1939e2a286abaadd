"""`edgelm chat` on the full screen against its line mode: tokens a second, and the peak of the process.

Both behind a pseudo-terminal of 80x24, the same prompts, greedy, in turn; speeds are what `/stats on` says. Once
with one core for the whole chat, so that nothing is drawn beside the computing, and once with all cores.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import common
import pyte

PROMPTS = (
    "Write a long guide to baking bread, with headings, a list of steps and a table of flours.",
    "Write a Python class for a bank account with a docstring and comments, then explain every line of it.",
    "Tell me a long story about a lighthouse keeper.",
)
SPEED = re.compile(r"([\d.]+) tok/s[^;]*; [\d.]+ [MG]B of")
ROWS, COLUMNS = 24, 80
CORES = sorted(os.sched_getaffinity(0))


class Behind:
    """A chat behind a pseudo-terminal; `screen` is what a person would see."""

    def __init__(self, argv: list[str], cores: list[int]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.child = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env={**os.environ, "TERM": "xterm"},
            preexec_fn=partial(os.sched_setaffinity, 0, cores),
        )  # fmt: skip
        os.close(slave)
        self._screen = pyte.Screen(COLUMNS, ROWS)
        self._stream = pyte.ByteStream(self._screen)

    def seen(self, silence_s: float = 0.6) -> str:
        """Collect until nothing comes for a while, then return the text of the screen.

        Nothing is emulated before: that costs more than to draw, and the chat may want the same core.
        """
        collected = bytearray()
        while select.select([self._master], [], [], silence_s)[0]:
            try:
                collected += os.read(self._master, 1 << 16)
            except OSError:
                break
        self._stream.feed(bytes(collected))
        return " ".join(" ".join(self._screen.display).split())

    def wait_for(self, pattern: str, timeout_s: float = 300) -> re.Match[str]:
        until = time.monotonic() + timeout_s
        while (match := re.search(pattern, text := self.seen())) is None:
            if time.monotonic() > until:
                raise RuntimeError(f"{pattern!r} did not come: {text}")
        return match

    def type(self, line: str) -> None:
        os.write(self._master, f"{line}\r".encode())

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def speeds(argv: list[str], cores: list[int]) -> tuple[list[float], int]:
    """Return the tokens a second of an answer to each prompt, and the peak of the process."""
    chat = Behind(argv, cores)
    chat.wait_for("/exit leaves|Ctrl-D leaves")
    chat.type("/stats on")
    chat.wait_for("a line of statistics")
    found = []
    for prompt in PROMPTS:
        chat.type("/clear")
        chat.wait_for("is forgotten")
        chat.type(prompt)
        found.append(float(chat.wait_for(SPEED.pattern)[1]))
        chat.type("/help")  # pushes the line of statistics out of sight
        chat.wait_for("Ctrl-C stops")
    peak_bytes = chat.peak_bytes()
    chat.type("/exit")
    while chat.child.poll() is None:
        chat.seen(0.1)
    return found, peak_bytes


def main() -> None:
    parser = common.arguments(__doc__, rounds=5, models=("smollm2-135m-instruct",))
    parser.add_argument("--memory", nargs="+", default=["110MB", "200MB"])
    parser.add_argument("--backend", default="llamacpp")
    args = parser.parse_args()
    shared = {"threads": args.threads, "backend": args.backend, "context": 1024, "rounds": args.rounds}
    report = common.Report("terminal", {**shared, "size": f"{COLUMNS}x{ROWS}"})
    os.sched_setaffinity(0, CORES[:1])  # the emulator's own work is the terminal's, not the chat's
    for name in args.models:
        model = common.find_model(name)
        for memory, cores in ((memory, cores) for memory in args.memory for cores in (CORES[-1:], CORES)):
            argv = [sys.executable, "-c", common.COMMAND, "chat", str(model), "--memory", memory, "--context", "1024"]
            argv += ["--threads", str(args.threads), "--backend", args.backend, "--max-tokens", "160"]
            found: dict[str, list[float]] = {"lines": [], "screen": []}
            peaks = dict.fromkeys(found, 0)
            for _ in range(args.rounds):
                for mode in found:
                    tps, peak_bytes = speeds(argv + ["--plain"] * (mode == "lines"), cores)
                    found[mode] += tps
                    peaks[mode] = max(peaks[mode], peak_bytes)
            lines, screen = (common.middle(found[mode]) for mode in found)
            report.add(
                "decode", model=name, memory=memory, cores=len(cores), lines_tps=lines, screen_tps=screen,
                ratio=screen / lines, lines_peak_mb=common.mb(peaks["lines"]),
                screen_peak_mb=common.mb(peaks["screen"]), every=[found],
            )  # fmt: skip
    report.finish()


if __name__ == "__main__":
    main()
