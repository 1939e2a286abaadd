"""What there is to run: the cache and the catalogue as one list. Fetches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelm_models import cache
from edgelm_models.catalogue import CATALOGUE

if TYPE_CHECKING:
    from edgelm.files.drafts import DraftFile
    from edgelm.files.kept import KeptPrefix
    from edgelm.files.prepared import PreparedFile


@dataclass(frozen=True, slots=True)
class Listed:
    """One model by name; `file` and `last_used_s` are None while it is not on this machine."""

    name: str
    size_bytes: int
    quantization: str
    context: int | None
    licence: str
    file: str | None
    last_used_s: float | None


def listing() -> list[Listed]:
    """Return the cached models, then those of the catalogue that are not here."""
    cached = cache.cached_models()
    here = [
        Listed(m.name, m.size_bytes, m.quantization, m.context, m.licence, m.file, cache.last_used_s(m)) for m in cached
    ]
    names = {model.name for model in cached}
    return here + [
        Listed(entry.name, entry.size_bytes, entry.quantization, entry.context, entry.licence, None, None)
        for entry in CATALOGUE.values()
        if entry.name not in names
    ]


def prefixes() -> list[KeptPrefix]:
    """Return the system messages that are kept, what is worth most first."""
    from edgelm.files.kept import listing

    return listing()


def prepared() -> list[PreparedFile]:
    """Return what backends have prepared of models, what was used last first."""
    from edgelm.files.prepared import listing

    return listing()


def drafts() -> list[DraftFile]:
    """Return the low-bit copies that were made of models."""
    from edgelm.files.drafts import listing

    return listing()
