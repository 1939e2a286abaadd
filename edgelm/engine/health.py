"""Which backends can be trusted here: each is tried in a child process first, and the verdict is kept on disk.

A library built for another processor ends the process that loads it, or never answers; the child is there to die for
it. Knows no library; what "works" means is the backend's own `probe`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.backend import Availability, Backend
from edgelm.engine.machine import digest, edgelm_version, machine_key
from edgelm.engine.registry import backend_names, get_backend
from edgelm.errors import BackendUnavailable, UnsupportedModel
from edgelm.files.model import ModelFile

TIMEOUT_S = 20.0
DOUBT_S = 3600.0
"""How long a verdict is believed that a busy or full machine may have caused."""
PREFERRED = ("llamacpp", "numpy")
_NO_LIBRARY = frozenset({"numpy"})  # edgelm runs on NumPy anyway: a child could only repeat what already works
_CHILD = """
import json, sys
from edgelm.engine.registry import get_backend
found = get_backend(sys.argv[1]).probe()
print()
print(json.dumps({"available": found.available, "reason": found.reason, "version": found.version}))
"""


def check(name: str, *, fresh: bool = False) -> Availability:
    """Say whether the backend of this name works here; never raises for one that does not.

    The verdict comes from disk if one was kept for this library, processor, Python and edgelm; else, with `fresh`, or
    if `EDGELM_RECHECK` is set, from a trial run in a child process that may take `TIMEOUT_S`. In a frozen application,
    which has no interpreter to start, the trial runs in this process. Raises `UnknownBackend`.
    """
    try:
        backend = get_backend(name)
    except BackendUnavailable as exc:
        if type(exc) is not BackendUnavailable:
            raise
        return Availability(False, exc.reason)
    if name in _NO_LIBRARY:
        return backend.probe()
    path = cache_dir() / "health" / f"{name}-{_key(backend)}.json"
    if not fresh and not os.environ.get("EDGELM_RECHECK") and (kept := _kept(path)) is not None:
        return kept
    found, doubtful = _try_here(backend) if _frozen() else _try_in_child(name)
    write_json(
        path,
        {
            "available": found.available,
            "reason": found.reason,
            "version": found.version,
            "until": time.time() + DOUBT_S if doubtful else None,
        },
    )
    return found


def choose(file: ModelFile, wanted: str = "auto") -> tuple[Backend, tuple[str, ...]]:
    """Return the backend for a model, and a sentence for each that was considered.

    `auto` takes the first of `PREFERRED`, then of all others, that works here and computes every tensor type of the
    model. Raises `UnknownBackend`; `BackendUnavailable` if the wanted one does not work here; `UnsupportedModel` if
    none that works computes the model.
    """
    if wanted != "auto":
        found = check(wanted)
        if not found.available:
            raise BackendUnavailable(wanted, found.reason)
        return get_backend(wanted), (f"{wanted}: chosen, as asked for ({found.version})",)
    types = {info.type for info in file.tensors.values() if info.n_rows > 1}
    notes: list[str] = []
    for name in _candidates():
        found = check(name)
        if not found.available:
            notes.append(f"{name}: passed over, {found.reason}")
            continue
        backend = get_backend(name)
        missing = types - backend.capabilities().types
        if missing:
            notes.append(f"{name}: passed over, it does not compute {', '.join(sorted(t.name for t in missing))}")
            continue
        notes.append(f"{name}: chosen ({found.version})")
        return backend, tuple(notes)
    raise UnsupportedModel(f"no backend computes this model ({'; '.join(notes)}); try another quantization")


def identity(backend: Backend) -> str:
    """Return what changes whenever the backend's library does: its own word for it, else its module's file.

    Loads no library. A backend says it with a method `identity() -> str`.
    """
    own = getattr(backend, "identity", None)
    if own is not None:
        return str(own())
    path = getattr(sys.modules.get(type(backend).__module__), "__file__", None)
    return file_facts(Path(path)) if path else type(backend).__module__


def file_facts(path: Path) -> str:
    """Return path, size and time of change of a file as one string."""
    try:
        facts = path.stat()
    except OSError:
        return f"{path} missing"
    return f"{path} {facts.st_size} {facts.st_mtime_ns}"


def _candidates() -> Iterator[str]:
    yield from PREFERRED
    yield from (name for name in backend_names() if name not in PREFERRED)


def _key(backend: Backend) -> str:
    module = sys.modules.get(type(backend).__module__)
    return digest(_version(), backend.name, identity(backend), getattr(module, "__file__", ""), machine_key())


def _version() -> str:
    """Return edgelm's version, and this file's facts: an editable install changes without changing the number."""
    return f"{edgelm_version()} {file_facts(Path(__file__))}"


def _kept(path: Path) -> Availability | None:
    found = read_json(path)
    if found is None:
        return None
    try:
        until = found["until"]
        if until is not None and not 0 <= float(until) - time.time() <= DOUBT_S:
            return None
        return Availability(bool(found["available"]), str(found["reason"]), str(found["version"]))
    except (KeyError, TypeError, ValueError):
        return None


def _frozen() -> bool:
    return bool(getattr(sys, "frozen", False)) or not sys.executable


def _try_here(backend: Backend) -> tuple[Availability, bool]:
    return backend.probe(), False


def _try_in_child(name: str) -> tuple[Availability, bool]:
    """Return the verdict, and whether another try could come out differently."""
    import subprocess  # 2 MB that a kept verdict spares

    folders = [os.path.abspath(folder) for folder in sys.path]
    try:
        done = subprocess.run(
            # -P: a folder that the user happens to stand in is no place for modules
            [sys.executable, "-P", "-c", _CHILD, name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Availability(False, f"it did not answer within {TIMEOUT_S:g} s in a trial run"), True
    except OSError as exc:
        return Availability(False, f"a trial run could not be started ({exc})"), True
    if done.returncode != 0:
        return _died(done.returncode, done.stderr.decode(errors="replace"))
    try:
        said = json.loads(done.stdout.splitlines()[-1])
        return Availability(said["available"], said["reason"], said["version"]), False
    except (IndexError, KeyError, TypeError, ValueError):
        return Availability(False, "its trial run gave no answer"), True


def _died(code: int, stderr: str) -> tuple[Availability, bool]:
    import signal

    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "")
    said = f": {last}" if last else ""
    if code in (-signal.SIGTERM, -9):  # SIGKILL, which Windows does not name
        return Availability(False, "its trial run was killed, perhaps because memory ran out"), True
    if code < 0:
        try:
            cause = signal.Signals(-code).name
        except ValueError:
            cause = f"signal {-code}"
        return Availability(False, f"its library crashed ({cause}) in a trial run{said}"), False
    if code >= 0x8000_0000:  # Windows: the status of the exception
        return Availability(False, f"its library crashed (0x{code:08X}) in a trial run{said}"), False
    return Availability(False, f"its trial run failed{said or f' (exit code {code})'}"), False
