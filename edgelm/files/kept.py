"""The folder of kept prefixes: keys and values of system messages, on flash. Beside them what guesses are made from.

Bounded: what is worth least, by tokens, uses and time since the last, goes first. Needs no lock: files appear and
vanish as a whole, and two processes that make the same one make the same.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from edgelm.cachedir import cache_dir
from edgelm.files.writing import remove_leftovers
from edgelm.hashing import blake2b
from edgelm.sizes import GB, parse_size

LIMIT_VARIABLE = "EDGELM_PREFIX_LIMIT"
DEFAULT_LIMIT_BYTES = 1 * GB
_SUFFIX, _NOTES, _GUESSES = ".kv", ".json", ".guesses"


class KeptPrefix(NamedTuple):
    """One kept prefix; `uses` counts the processes that read it, `used_s` is when, since the epoch."""

    path: Path
    model: str
    n_tokens: int
    size_bytes: int
    uses: int
    used_s: float

    @property
    def worth(self) -> float:
        """Tokens that it saves, by how often and how lately."""
        return self.n_tokens * (1 + self.uses) / (3600 + time.time() - self.used_s)


def folder() -> Path:
    """Return where kept prefixes are."""
    return cache_dir() / "prefixes"


def listing() -> list[KeptPrefix]:
    """Return every kept prefix, what is worth most first."""
    found = []
    for path in folder().glob(f"*{_SUFFIX}"):
        notes = {}
        with suppress(OSError, ValueError):
            notes = json.loads(path.with_suffix(_NOTES).read_text())
        with suppress(OSError, TypeError, ValueError, AttributeError):
            facts = path.stat()
            n_tokens, uses = int(notes.get("tokens", 0)), int(notes.get("uses", 0))
            used_s = float(notes.get("used_s", facts.st_mtime))
            found.append(KeptPrefix(path, str(notes.get("model", "?")), n_tokens, facts.st_size, uses, used_s))
    return sorted(found, key=lambda kept: -kept.worth)


def make_folder() -> None:
    """Make the folder, and remove what processes that were killed have left half-written there."""
    folder().mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder())


def remove(fingerprint: str = "") -> int:
    """Remove what is kept for the models with this fingerprint, or for all; return the bytes freed."""
    remove_leftovers(folder())
    guesses = 0
    for path in folder().glob(f"{fingerprint}*{_GUESSES}"):
        with suppress(OSError):
            guesses += path.stat().st_size
            path.unlink()
    return guesses + sum(_unlink(kept) for kept in listing() if kept.path.name.startswith(fingerprint))


def keep_within_limit(newest: Path) -> None:
    """Remove what is worth least until all fits in the limit; `newest` goes only if it does not fit by itself."""
    limit = parse_size(os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT_BYTES)
    kept = listing()
    total = sum(one.size_bytes for one in kept)
    for one in reversed(kept):
        if total <= limit:
            break
        if one.path != newest or one.size_bytes > limit:
            total -= _unlink(one)


def _unlink(kept: KeptPrefix) -> int:
    with suppress(OSError):
        kept.path.unlink()
        kept.path.with_suffix(_NOTES).unlink(missing_ok=True)
        return kept.size_bytes
    return 0


def note_use(path: Path, model: str, n_tokens: int, first: bool = False) -> None:
    """Remember that a prefix was used now, or made."""
    notes = path.with_suffix(_NOTES)
    uses = 0
    with suppress(OSError, ValueError, TypeError, KeyError):
        uses = 0 if first else int(json.loads(notes.read_text())["uses"]) + 1
    with suppress(OSError):
        text = json.dumps({"model": model, "tokens": n_tokens, "uses": uses, "used_s": time.time()})
        partial = notes.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(text)
        partial.replace(notes)


def path_of(fingerprint: str, identity: str, types: Sequence[str], prefix: Sequence[int]) -> Path:
    """Return where the prefix of a model is kept by caches whose keys and values are of these types.

    Half and single precision share a file; what was kept in fewer bits has its own.
    """
    types = ["f16" if one == "f32" else one for one in types]
    key = blake2b(f"{identity} {types} {','.join(map(str, prefix))}".encode(), digest_size=16).hexdigest()
    return folder() / f"{fingerprint}-{key}{_SUFFIX}"


def guesses_path(fingerprint: str, identity: str) -> Path:
    """Return where what was learned for guesses is kept for a model: `edgelm.guesses`."""
    return folder() / f"{fingerprint}-{identity}{_GUESSES}"
