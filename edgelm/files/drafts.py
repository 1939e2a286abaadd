"""Low-bit copies of models, made to draft for them: where they are kept. Knows neither how they are made nor used."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

from edgelm.cachedir import cache_dir
from edgelm.errors import EdgeLMError
from edgelm.files import prepared
from edgelm.files.index import open_indexed
from edgelm.files.model import ModelFile

OF_KEY = "edgelm.draft.of"
"""Metadata of a copy: the name of the file that it was made of."""


class DraftFile(NamedTuple):
    """One copy: `model` is the name of the file it was made of, `type` that of most of its weights."""

    path: Path
    model: str
    type: str
    size_bytes: int


def folder() -> Path:
    """Return where copies are."""
    return cache_dir() / "drafts"


def path_of(source: ModelFile, kind: str) -> Path:
    """Return the name of the copy of a model in this type."""
    return folder() / f"{source.fingerprint}-{kind}.gguf"


def find(source: ModelFile) -> Path | None:
    """Return the copy of this model that was made last; None if there is none."""
    found = []
    for path in folder().glob(f"{source.fingerprint}-*.gguf"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    return max(found)[1] if found else None


def listing() -> list[DraftFile]:
    """Return every copy. Damaged ones are among them: they take room."""
    found = []
    for path in sorted(folder().glob("*.gguf")):
        with contextlib.suppress(OSError):
            kind = path.stem.partition("-")[2]
            found.append(DraftFile(path, _model_of(path), kind, path.stat().st_size))
    return found


def remove(fingerprint: str = "") -> int:
    """Remove the copies of the model with this fingerprint, or all, and what was prepared of them; return the bytes."""
    freed = 0
    for path in folder().glob(f"{fingerprint}-*.gguf" if fingerprint else "*.gguf"):
        with contextlib.suppress(EdgeLMError):  # of a damaged one nothing was prepared
            freed += prepared.remove(open_indexed(path).fingerprint)
        with contextlib.suppress(OSError):  # gone already, or in use where that forbids it
            n_bytes = path.stat().st_size
            path.unlink()
            freed += n_bytes
    return freed


def _model_of(path: Path) -> str:
    try:
        return str(open_indexed(path).metadata.get(OF_KEY, "?"))
    except EdgeLMError:
        return "damaged"
