"""Run Python in a child process that may crash or hang, and say in a sentence what came of it.

The child is there to die in place of this process. Knows nothing of what it does.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, NamedTuple

MARK = "\x1eedgelm "
"""What an answer begins with: libraries print lines of their own."""
_BEGIN = f"""
import json, os, threading

def end_with_parent():
    os.read(0, 1)  # nothing is ever written: it ends when the other end is closed, whatever ended the parent
    os._exit(1)

threading.Thread(target=end_with_parent, daemon=True).start()
try:  # a crash is expected: its memory need not be kept as a file; and where memory runs out, the host is not to go
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
except (ImportError, OSError, ValueError):
    pass

def report(**facts):
    print("\\n" + {MARK!r} + json.dumps(facts), flush=True)
"""


class Outcome(NamedTuple):
    """`facts`: what the child reported, later reports over earlier ones. `problem`: a sentence if it came to grief.

    `doubtful`: another try could come out differently.
    """

    facts: dict[str, Any]
    problem: str = ""
    doubtful: bool = False


_INTERPRETER = re.compile(r"(python|pypy|graalpy)[\d.]*[a-z]?(\.exe)?", re.IGNORECASE)
"""File names of interpreters: python3.13t, pythonw.exe, pypy3."""


def can_start() -> bool:
    """Say whether there is an interpreter to start.

    A frozen application has none; one that has Python inside (Briefcase's, uWSGI, Blender) is its own `sys.executable`,
    which does not run code that it is given but starts all over again, and so would that one.
    """
    return not getattr(sys, "frozen", False) and bool(_INTERPRETER.fullmatch(os.path.basename(sys.executable or "")))


def run_child(code: str, arguments: tuple[str, ...], timeout_s: float, what: str) -> Outcome:
    """Run `code`, which finds `arguments` in `sys.argv[1:]` and calls `report(**facts)`.

    `what` names the undertaking in sentences: "a trial run".
    """
    import subprocess  # 2 MB that a kept verdict spares

    folders = [os.path.abspath(folder) for folder in sys.path]
    lives, held = os.pipe()
    environment = {name: value for name, value in os.environ.items() if name != "EDGELM_RECHECK"}  # that is done here
    try:
        done = subprocess.run(
            # -P: a folder that the user happens to stand in is no place for modules
            [sys.executable, "-P", "-c", _BEGIN + code, *arguments],
            env={**environment, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=lives,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return Outcome(_facts(late.stdout), f"it did not answer within {timeout_s:g} s in {what}", True)
    except OSError as exc:
        return Outcome({}, f"{what} could not be started ({exc})", True)
    finally:
        os.close(held)
        os.close(lives)
    facts = _facts(done.stdout)
    if done.returncode != 0:
        problem, doubtful = _died(done.returncode, done.stderr.decode(errors="replace"), what)
        return Outcome(facts, problem, doubtful)
    return Outcome(facts)


def _facts(stdout: bytes | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in (stdout or b"").decode(errors="replace").split("\n"):
        if line.startswith(MARK):
            try:
                found.update(json.loads(line.removeprefix(MARK)))
            except (TypeError, ValueError):
                continue  # cut off as it died
    return found


def _died(code: int, stderr: str, what: str) -> tuple[str, bool]:
    import signal

    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    said = f": {last}" if last else ""
    if code in (-signal.SIGTERM, -9):  # SIGKILL, which Windows does not name
        return f"it was killed in {what}, perhaps because memory ran out", True
    if code < 0:
        try:
            cause = signal.Signals(-code).name
        except ValueError:
            cause = f"signal {-code}"
        return f"its library crashed ({cause}) in {what}{said}", False
    if code >= 0x8000_0000:  # Windows: the status of the exception
        return f"its library crashed (0x{code:08X}) in {what}{said}", False
    return f"it failed in {what}{said or f' (exit code {code})'}", last.startswith("MemoryError")
