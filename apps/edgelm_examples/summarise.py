"""Write a summary beside every text of a folder, in the background, in little memory:
`python apps/edgelm_examples/summarise.py model.gguf notes/ --memory 110MB --watch 60`.

`notes/walk.txt` gets `notes/walk.txt.summary`, which appears as a whole or not at all. What has a summary that is newer
than the text is skipped, so the script may be stopped (SIGTERM, Ctrl-C) and started again at any time. It runs at the
lowest priority for processor and disk that the system has.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil

import edgelm

ENDINGS = (".txt", ".md")
SUFFIX = ".summary"
ASK = "Summarise the following text in a few sentences.\n\n"


class Stopped(Exception):
    """The script was asked to end."""


class Writer:
    """Writes summaries with one model until it is stopped. `stop` may be called from a signal handler."""

    def __init__(self, model: edgelm.Model, most_tokens: int) -> None:
        self._model, self._most_tokens = model, most_tokens

    def summary(self, text: str, stop: threading.Event) -> str:
        """Return the summary of a text of any length. Raises `Stopped`."""
        chat = self._model.chat()
        room = self._model.plan.context - self._most_tokens
        if len(text) > 1 and len(self._model.tokenizer.encode(chat.render(ASK + text))) > room:
            shorter = "\n".join(self.summary(half, stop) for half in halves(text))
            return self.summary(shorter, stop) if len(shorter) < len(text) else shorter
        chunks = chat.stream(ASK + text, max_tokens=self._most_tokens)
        if stop.is_set():  # asked after the stream was: a signal before it is seen here, one after it ends the stream
            raise Stopped
        pieces = [chunk for chunk in chunks if chunk.text or chunk.finish_reason]
        if pieces[-1].finish_reason == "cancelled":
            raise Stopped
        return "".join(chunk.text for chunk in pieces).strip()


def halves(text: str) -> tuple[str, str]:
    """Cut a text in two, near its middle, at the end of a paragraph, line or word if there is one."""
    middle = len(text) // 2
    for mark in ("\n\n", "\n", " "):
        at = text.find(mark, middle)
        if 0 < at < len(text) - len(mark) and at < middle * 3 // 2:
            return text[:at], text[at + len(mark) :]
    return text[:middle], text[middle:]


def waiting(places: Sequence[Path]) -> Iterator[Path]:
    """Yield the texts that have no summary, or an older one."""
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if (path.suffix in ENDINGS or not place.is_dir()) and changed_ns(target_of(path)) < changed_ns(path):
                yield path


def target_of(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def changed_ns(path: Path) -> int:
    """Return when a file was changed last; -1 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1


def write(path: Path, summary: str, read_ns: int) -> None:
    """Put a summary beside its text, as old as the text that was read: nobody ever sees half of it."""
    target = target_of(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(summary + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.utime(partial, ns=(read_ns, read_ns))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def step_back() -> None:
    """Let everything else go first, for processor and disk. Before the model is loaded: its threads inherit it."""
    process = psutil.Process()
    if sys.platform == "win32":
        process.nice(psutil.IDLE_PRIORITY_CLASS)
        process.ionice(psutil.IOPRIO_VERYLOW)
        return
    process.nice(19)
    if sys.platform == "linux":
        process.ionice(psutil.IOPRIO_CLASS_IDLE)


def work(writer: Writer, places: Sequence[Path], stop: threading.Event, every_s: float | None) -> int:
    """Write what is missing; with `every_s`, look again and again until stopped. Returns how many were written."""
    n_written = 0
    failed: dict[Path, int] = {}  # at which time of change; tried again once the text has changed
    while True:
        for path in waiting(places):
            changed = changed_ns(path)
            if failed.get(path) == changed:
                continue
            try:
                write(path, writer.summary(path.read_text(encoding="utf-8"), stop), changed)
            except (edgelm.EdgeLMError, OSError, UnicodeDecodeError) as error:
                failed[path] = changed
                print(f"{path}: {error}", file=sys.stderr, flush=True)
                continue
            n_written += 1
            print(path.name + SUFFIX, flush=True)
        if every_s is None or stop.wait(every_s):
            return n_written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a summary beside every text, in the background.")
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument(
        "places", nargs="+", type=Path, help=f"folders (texts that end in {' or '.join(ENDINGS)}), or files"
    )
    parser.add_argument("--memory", default="110MB", help="budget of the whole process [default: 110MB]")
    parser.add_argument(
        "--context", type=int, default=1024, help="longer texts are summarised in parts [default: 1024]"
    )
    parser.add_argument("--max-tokens", type=int, default=120, help="of a summary [default: 120]")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="look for new texts so often, until stopped")
    asked = parser.parse_args(argv)
    if not 0 < asked.max_tokens <= asked.context // 2:
        parser.error(f"--max-tokens must be between 1 and half of --context, got {asked.max_tokens}")
    missing = [str(place) for place in asked.places if not place.exists()]
    if missing:
        parser.error(f"there is no {', '.join(missing)}")
    stop = threading.Event()
    stopper: list[edgelm.Model] = []

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        for model in stopper:
            model.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    step_back()
    try:
        with edgelm.load(asked.model, memory=asked.memory, context=asked.context) as model:
            stopper.append(model)
            n_written = work(Writer(model, asked.max_tokens), asked.places, stop, asked.watch)
    except Stopped:
        print("stopped; what is missing is written at the next start", file=sys.stderr)
        return 0
    except edgelm.EdgeLMError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{n_written} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
