"""Prepared files: the matrices of a model in the layout of a backend, made once and kept in the cache folder.

Finds, checks, lists and clears them, and keeps their sum within a bound; what was used longest ago goes first. Knows
neither how they are made nor what the bytes mean. A prepared file is its tensors and three sections as a pack has them
(`edgelm.files.pack`), under a magic of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from edgelm.cachedir import cache_dir
from edgelm.errors import PreparationError, UnsupportedModel
from edgelm.files.errors import DamagedPack
from edgelm.files.model import Checksums, ModelFile, TensorInfo
from edgelm.files.pack import n_tiles, read_sections
from edgelm.sizes import GB, human, parse_size

MAGIC = b"edgelmPR"
SUFFIX = ".prepared"
LIMIT_VARIABLE = "EDGELM_PREPARED_LIMIT"
DEFAULT_LIMIT_BYTES = 16 * GB
_HINT = "run `edgelm rm --prepared` and start again: the file is made anew"
_opened: set[Path] = set()  # what this process uses, or has used


class PreparedFile(NamedTuple):
    """One prepared file: `model` is the name of the file it was made of, `used_s` when, since the epoch."""

    path: Path
    model: str
    backend: str
    size_bytes: int
    used_s: float


def folder() -> Path:
    """Return where prepared files are."""
    return cache_dir() / "prepared"


def limit_bytes() -> int:
    """Return how much all prepared files may take. Raises `ConfigError` for a size that makes no sense."""
    return parse_size(os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT_BYTES)


def path_of(source: ModelFile, key: str) -> Path:
    """Return the name of the prepared file of a model under a key of everything that its bytes depend on."""
    return folder() / f"{source.fingerprint}-{key}{SUFFIX}"


def open_prepared(path: Path, source: ModelFile) -> ModelFile | None:
    """Return `source` with its matrices in the prepared file; None if there is none, or it is not whole.

    Remembers that the file was used now.
    """
    try:
        found = read_sections(path, MAGIC)
        if found is None:
            return None
        index = json.loads(found.table)
        tensors = [_restored(source.tensors[entry[0]], entry, found.file_bytes) for entry in index["tensors"]]
        if sum(map(n_tiles, tensors)) * 8 != len(found.checksums):
            return None
        checksums = Checksums(0, tuple(tensors), memoryview(found.checksums), _HINT)
        model = placed(source, path, tensors, frozenset(index["gathered"]), found.file_bytes, checksums)
    except (DamagedPack, UnsupportedModel, KeyError, TypeError, ValueError, IndexError):
        return None  # it is made again
    _opened.add(path)
    with contextlib.suppress(OSError):
        _stamp(path).touch()
    return model


def placed(
    source: ModelFile,
    path: Path,
    tensors: Iterable[TensorInfo],
    gathered: frozenset[str],
    file_bytes: int,
    checksums: Checksums | None = None,
) -> ModelFile:
    """Return `source` with these tensors in a file before its own. `gathered`: whose rows are looked up in the source.

    Without `checksums` the file need not be there.
    """
    shifted = {name: _behind(info) for name, info in source.tensors.items()}
    derived = {
        name: how._replace(place=_behind(how.place), sources=tuple(map(_behind, how.sources)))
        for name, how in source.derived.items()
    }
    own = () if checksums is None else (checksums,)
    return source._replace(
        paths=(path, *source.paths),
        tensors=MappingProxyType(shifted | {info.name: info for info in tensors}),
        file_bytes=(file_bytes, *source.file_bytes),
        gathered=MappingProxyType({name: shifted[name] for name in gathered}),
        checksums=(*own, *(part._replace(file=part.file + 1) for part in source.checksums)),
        derived=MappingProxyType(derived),
    )


def _behind(info: TensorInfo) -> TensorInfo:
    """Return the same place where one more file stands before its own."""
    return info._replace(file=info.file + 1)


def index_of(model: str, backend: str, tensors: Iterable[TensorInfo], gathered: Iterable[str]) -> bytes:
    """Return the index of a prepared file."""
    entries = [[info.name, info.offset, info.n_bytes, info.row_step, info.packed_row_bytes] for info in tensors]
    content: Mapping[str, Any] = {
        "model": model,
        "backend": backend,
        "tensors": entries,
        "gathered": sorted(gathered),
    }
    return json.dumps(content).encode()


def _restored(info: TensorInfo, entry: list[Any], file_bytes: int) -> TensorInfo:
    _, offset, n_bytes, row_step, row_bytes = entry
    if not 0 <= offset <= offset + n_bytes <= file_bytes or n_bytes != info.n_rows * row_bytes or row_step < 1:
        raise ValueError(f"tensor {info.name!r}")
    return info._replace(file=0, offset=offset, n_bytes=n_bytes, row_step=row_step, packed_row_bytes=row_bytes)


def listing() -> list[PreparedFile]:
    """Return every prepared file, what was used last first. Damaged ones are among them: they take room."""
    found = []
    for path in _paths():
        with contextlib.suppress(OSError):
            facts = path.stat()
            found.append(PreparedFile(path, *_names(path), facts.st_size, _used_s(path)))
    return sorted(found, key=lambda file: -file.used_s)


def _stamp(path: Path) -> Path:
    """Return the empty file whose time says when a prepared file was used.

    Not the file's own times: whoever reads it watches that of its last change, and systems keep that of the last read
    as they like.
    """
    return path.with_suffix(".used")


def _used_s(path: Path) -> float:
    try:
        return _stamp(path).stat().st_mtime
    except OSError:
        return path.stat().st_mtime


def _names(path: Path) -> tuple[str, str]:
    """Return the model and the backend that a prepared file says it is for."""
    try:
        found = read_sections(path, MAGIC)
        index = json.loads(found.table) if found is not None else {}
        return str(index["model"]), str(index["backend"])
    except (DamagedPack, UnsupportedModel, KeyError, TypeError, ValueError):
        return "damaged", "?"


def remove(fingerprint: str = "") -> int:
    """Remove the prepared files of the models with this fingerprint, or all; return the bytes freed.

    A file that another process computes on stays readable for it where the system allows that (POSIX).
    """
    return sum(_unlink(path) for path in _paths(f"{fingerprint}-*" if fingerprint else "*"))


def make_room(n_bytes: int, target: Path) -> None:
    """Remove what was used longest ago until `target` with `n_bytes` fits within the bound and onto the disk.

    What this process has opened stays. Raises `PreparationError` where that is not enough; then nothing was removed.
    """
    from edgelm.files.writing import free_bytes

    others = [file for file in listing() if file.path != target]
    limit, total = limit_bytes(), n_bytes + sum(file.size_bytes for file in others)
    free = free_bytes(folder())
    gone: list[PreparedFile] = []
    for file in reversed(others):
        if total <= limit and n_bytes <= free:
            break
        if file.path not in _opened:
            gone.append(file)
            total -= file.size_bytes
            free += file.size_bytes
    if total > limit:
        raise PreparationError(
            f"preparing this model for the backend takes {human(n_bytes)}, and prepared files may take "
            f"{human(limit)} together; raise {LIMIT_VARIABLE}, or use another backend"
        )
    if n_bytes > free:
        raise PreparationError(
            f"preparing this model for the backend takes {human(n_bytes)}, and {human(free)} are free in {folder()}; "
            "make room, set EDGELM_CACHE to a folder on another disk, or use another backend"
        )
    for file in gone:
        _unlink(file.path)


def _paths(pattern: str = "*") -> list[Path]:
    return sorted(folder().glob(pattern + SUFFIX))


def _unlink(path: Path) -> int:
    try:
        n_bytes = path.stat().st_size
        path.unlink()
        _stamp(path).unlink(missing_ok=True)
    except OSError:  # gone already, or in use where that forbids it
        return 0
    return n_bytes
