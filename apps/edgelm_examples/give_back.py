"""Answer questions, one a line, and give memory back when the system asks:
`python apps/edgelm_examples/give_back.py model.gguf --memory 300MB < questions.txt`.

Three things ask for memory, each with the same effect between two tokens of a running answer:

- SIGUSR1 (a supervisor's, say): down to the smallest budget that works. SIGUSR2: back to the full one.
- The kernel's own pressure file, if there is one: `--pressure` names it (/proc/pressure/memory, or `memory.pressure` of
  a control group). It wakes this script when tasks were stalled for want of memory; after a calm while the full budget
  comes back.
- With `--adaptive` edgelm watches the system by itself, and none of the code below is needed for that.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import edgelm

PRESSURE = Path("/proc/pressure/memory")
STALL_US, WINDOW_US = 100_000, 2_000_000
"""Stalls of a twentieth of two seconds: the shortest window that the kernel grants to everybody."""
CALM_S = 20.0


class Keeper:
    """Changes a model's budget in a thread of its own, when it is woken by `give_back`, `take_again` or the kernel.

    Not in a signal handler: that runs in the middle of whatever the main thread does, a pass of the model included.
    """

    def __init__(
        self, model: edgelm.Model, say: Callable[[str], None], pressure: Path | None = None, calm_s: float = CALM_S
    ) -> None:
        self._model, self._say, self._calm_s = model, say, calm_s
        self._full = model.plan.budget_bytes
        self._wakes, self._wake = os.pipe()
        self._triggers: int | None = None
        if pressure is not None:
            try:
                self._triggers = open_trigger(pressure)
            except OSError as error:
                say(f"{pressure} will not wake us: {error.strerror}")
        self._thread = threading.Thread(target=self._watch, name="keeper", daemon=True)
        self._thread.start()

    def give_back(self) -> None:
        """Ask for the smallest budget; at once from any thread or signal handler."""
        os.write(self._wake, b"-")

    def take_again(self) -> None:
        """Ask for the full budget."""
        os.write(self._wake, b"+")

    def close(self) -> None:
        """End the thread; before the model is closed."""
        os.write(self._wake, b".")
        self._thread.join()
        for handle in (self._wakes, self._wake, self._triggers):
            if handle is not None:
                os.close(handle)

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._wakes, select.POLLIN)
        if self._triggers is not None:
            poll.register(self._triggers, select.POLLPRI)
        stalled = False
        while True:
            events = dict(poll.poll(self._calm_s * 1000 if stalled else None))
            if self._triggers in events and events[self._triggers] & select.POLLERR:  # its control group is gone
                poll.unregister(self._triggers)
                continue
            word = os.read(self._wakes, 1) if self._wakes in events else b""
            if word == b".":
                return
            stalled = bool(events) and not word  # what a signal took, only a signal gives
            self._go_to(self._full if word == b"+" or not events else None)

    def _go_to(self, budget_bytes: int | None) -> None:
        """Go over to a budget, or to the smallest one."""
        before = self._model.plan.budget_bytes
        try:
            try:
                after = self._model.set_budget(budget_bytes or 1).budget_bytes
            except edgelm.BudgetTooSmall as error:  # it says what would do
                after = self._model.set_budget(error.needed_bytes).budget_bytes
        except edgelm.EdgeLMError as error:
            self._say(f"the budget stays: {error}")
            return
        if after != before:
            self._say(f"budget {before / 1e6:.0f} MB -> {after / 1e6:.0f} MB")


def open_trigger(path: Path) -> int:
    """Register with the kernel to be woken by stalls (Documentation/accounting/psi.rst). Raises `OSError`."""
    handle = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(handle, f"some {STALL_US} {WINDOW_US}\0".encode())
    except OSError:
        os.close(handle)
        raise
    return handle


def answer(model: edgelm.Model, questions: Iterable[str], most_tokens: int) -> None:
    """Print the answer to each line, and on the other stream what it took."""
    for line in questions:
        if not line.strip():
            continue
        for chunk in model.chat().stream(line.strip(), max_tokens=most_tokens):
            print(chunk.text, end="", flush=True)
        print(flush=True)
        usage = chunk.usage
        said = f"{usage.rss_bytes / 1e6:.1f} MB of {usage.budget_bytes / 1e6:.1f} MB, {usage.decode_tps:.1f} tok/s"
        print(f"[{said}]", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Answer questions, and give memory back when the system asks.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--memory", default="300MB", help="budget of the whole process [default: 300MB]")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--pressure", type=Path, default=PRESSURE if PRESSURE.exists() else None, metavar="FILE")
    parser.add_argument("--adaptive", action="store_true", help="leave it to edgelm instead")
    asked = parser.parse_args(argv)

    def say(sentence: str) -> None:
        print(f"[{sentence}]", file=sys.stderr, flush=True)

    try:
        adaptive = say if asked.adaptive else False
        with edgelm.load(asked.model, memory=asked.memory, context=asked.context, adaptive=adaptive) as model:
            if asked.adaptive:
                answer(model, sys.stdin, asked.max_tokens)
                return 0
            keeper = Keeper(model, say, asked.pressure)

            def hear(number: int, _frame: FrameType | None) -> None:
                (keeper.give_back if number == signal.SIGUSR1 else keeper.take_again)()

            for number in (signal.SIGUSR1, signal.SIGUSR2):
                signal.signal(number, hear)
            say(f"ready, process {os.getpid()}")
            try:
                answer(model, sys.stdin, asked.max_tokens)
            finally:
                keeper.close()
    except (edgelm.EdgeLMError, OSError) as error:
        print(error, file=sys.stderr)
        return error.exit_code if isinstance(error, edgelm.EdgeLMError) else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
