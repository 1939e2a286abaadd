"""Which backends can be trusted here: each is tried in a child process first, and the verdict is kept on disk.

A library built for another processor ends the process that loads it, or never answers; the child is there to die for
it. The host imports a backend's module only after a child did. What is tried is in `trial`; knows no library.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.backend import Backend, Session
from edgelm.engine.children import can_start, run_child
from edgelm.engine.machine import digest, file_facts, machine_key, release
from edgelm.engine.registry import get_backend, origin
from edgelm.errors import BackendUnavailable, EdgeLMError

TIMEOUT_S = 20.0
DOUBT_S = 3600.0
"""How long a verdict is believed that a busy or full machine may have caused, or whose library cannot be told."""
ORACLE = "numpy"
"""edgelm runs on NumPy anyway: a child could only repeat what already works."""
_TRIAL = str(Path(__file__).with_name("trial.py"))
_CHILD = """
import sys
from edgelm.engine.trial import trial
trial(sys.argv[1], report)
"""


_tried: set[str] = set()  # by this process


class Verdict(NamedTuple):
    """What came of trying a backend. `broken`: it did not say so itself, but crashed, hung, or gave wrong answers.

    `identity` is what its library was then; None if not even importing it is known to be safe. `graphs`: it is of use
    for models that are one graph, though it is not available.
    """

    available: bool
    reason: str = ""
    version: str = ""
    broken: bool = False
    identity: str | None = None
    graphs: bool = False


def check(name: str, *, fresh: bool = False) -> Verdict:
    """Say whether the backend of this name works here; never raises for one that does not.

    The verdict comes from disk if one was kept for this library, processor, Python and edgelm; else, with `fresh`, or
    once if `EDGELM_RECHECK` is set, from a trial run in a child process that may take `TIMEOUT_S`. In a frozen
    application, which has no interpreter to start, the trial runs in this process. Raises `UnknownBackend`.
    """
    module = origin(name)
    if name == ORACLE:
        backend = get_backend(name)
        found = backend.probe()
        return Verdict(found.available, found.reason, found.version, identity=identity(backend))
    path = cache_dir() / "health" / f"{name}-{digest(release(__file__, _TRIAL), name, module, machine_key())}.json"
    fresh |= bool(os.environ.get("EDGELM_RECHECK")) and name not in _tried
    if not fresh:
        kept = _kept(path)
        if kept is not None and (kept.identity is None or kept.identity == _identity_here(name)):
            return kept
    _tried.add(name)
    verdict, doubtful = _try_in_child(name) if can_start() else _try_here(name)
    until = time.time() + DOUBT_S if doubtful or verdict.identity is None else None
    write_json(path, {**verdict._asdict(), "until": until})
    return verdict


def open_session(name: str, n_threads: int) -> tuple[Backend, Session]:
    """Open a backend that was found to work. Raises `BackendUnavailable` if it is not what was tried."""
    tried = check(name)
    if not tried.available:
        raise BackendUnavailable(name, tried.reason)
    backend = get_backend(name)
    try:
        session = backend.open(n_threads)
    except EdgeLMError:
        raise
    except Exception as exc:  # a stranger's code
        raise BackendUnavailable(name, f"it failed to open ({type(exc).__name__}: {exc})") from exc
    loaded = loaded_version(session)
    if loaded and loaded != tried.version:
        session.close()
        raise BackendUnavailable(name, f"it was tried as {tried.version}, but what it loads now is {loaded}")
    if identity(backend) != tried.identity:
        session.close()
        raise BackendUnavailable(name, "its library changed between its trial and now", "start again")
    return backend, session


def loaded_version(session: Session) -> str:
    """Return the version that a session says it has loaded; empty if it does not say."""
    return str(getattr(session, "version", ""))


def identity(backend: Backend) -> str:
    """Return what changes whenever the backend's library does: its own word for it, else its module's file.

    Loads no library. A backend says it with a method `identity() -> str`.
    """
    own = getattr(backend, "identity", None)
    if own is not None:
        return str(own())
    path = getattr(sys.modules.get(type(backend).__module__), "__file__", None)
    return file_facts(Path(path)) if path else type(backend).__module__


def _identity_here(name: str) -> str | None:
    """Return the identity of a backend whose module can be imported without harm; None if that fails now."""
    try:
        return identity(get_backend(name))
    except Exception:  # a stranger's code; the next trial says what it is
        return None


def _kept(path: Path) -> Verdict | None:
    found = read_json(path)
    if found is None:
        return None
    try:
        until = found["until"]
        if until is not None and not 0 <= float(until) - time.time() <= DOUBT_S:
            return None
        return _verdict(found)
    except (KeyError, TypeError, ValueError):
        return None


def _verdict(found: dict[str, object]) -> Verdict:
    own = found.get("identity")
    return Verdict(
        bool(found["available"]),
        str(found["reason"]),
        str(found["version"]),
        bool(found.get("broken")),
        None if own is None else str(own),
        bool(found.get("graphs")),
    )


def _try_here(name: str) -> tuple[Verdict, bool]:
    from edgelm.engine.trial import trial

    facts: dict[str, object] = {}
    try:
        trial(name, lambda **more: facts.update(more))
    except Exception as exc:  # a stranger's code
        own = facts.get("identity")
        reason = f"it failed in a trial run: {type(exc).__name__}: {exc}"
        return Verdict(False, reason, str(facts.get("version", "")), True, None if own is None else str(own)), True
    return _verdict(facts), False


def _try_in_child(name: str) -> tuple[Verdict, bool]:
    """Return the verdict, and whether another try could come out differently."""
    facts, problem, doubtful = run_child(_CHILD, (name,), TIMEOUT_S, "a trial run")
    if not problem and not facts.get("done"):
        problem, doubtful = "its trial run gave no answer", True
    if problem:
        own = facts.get("identity")
        return Verdict(False, problem, str(facts.get("version", "")), True, None if own is None else str(own)), doubtful
    return _verdict(facts), False
