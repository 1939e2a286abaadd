"""Where pulled models live on disk, and what is there.

A model is registered by one rename of a whole folder, so a killed pull leaves nothing half visible.
Knows no source and opens no connection.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgelm.cachedir import cache_dir as cache_dir  # also for callers of this module
from edgelm.errors import DownloadError, EdgeLMError, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

MANIFEST = "manifest.json"


class CachedModel(NamedTuple):
    """One pulled model. `file` is absolute: of a split model the first shard of `files`, of a folder the folder."""

    name: str
    file: str
    files: tuple[str, ...]
    size_bytes: int
    sha256: str
    quantization: str
    context: int | None
    licence: str
    source: str
    pulled_at_s: float

    @property
    def path(self) -> Path:
        return Path(self.file)

    @property
    def exists(self) -> bool:
        return all(os.path.isfile(file) for file in self.files)


def folder_of(name: str) -> Path:
    """Return the folder that registers `name`: one for each name, safe on every file system."""
    return cache_dir() / "models" / safe_name(name)


def safe_name(name: str) -> str:
    # Hub names allow neither "--" nor "@", so two names never share a folder.
    return name.replace("/", "--").replace(":", "@")


def downloads_of(name: str) -> Path:
    """Return the folder of what is on its way or was set aside: never looked at when models are listed."""
    return cache_dir() / "downloads" / safe_name(name)


def find(name: str) -> CachedModel | None:
    """Return the registered model, or None if it is not there, or its files are gone."""
    model = _read_manifest(folder_of(name))
    return model if model is not None and model.exists else None


def cached_models() -> list[CachedModel]:
    """Return every registered model, by name."""
    root = cache_dir() / "models"
    folders = sorted(root.iterdir()) if root.is_dir() else []
    found = (_read_manifest(folder) for folder in folders)
    return [model for model in found if model is not None and model.exists]


def register(model: CachedModel, staged: Path) -> CachedModel:
    """Make `staged` (a folder beside `models`, which may hold files of the model) the entry of `model.name`.

    Files of `model` inside `staged` are given by their name alone and become absolute.
    """
    with open(staged / MANIFEST, "w", encoding="utf-8") as out:
        json.dump(model._asdict(), out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    target = folder_of(model.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    os.rename(staged, target)
    registered = _read_manifest(target)
    assert registered is not None
    return registered


def touch(model: CachedModel) -> None:
    """Remember that `model` was used now; a read-only cache is fine."""
    with suppress(OSError):
        os.utime(folder_of(model.name) / MANIFEST)


def last_used_s(model: CachedModel) -> float:
    """Return when `model` was last used, in seconds since the epoch."""
    return os.stat(folder_of(model.name) / MANIFEST).st_mtime


def remove(name: str) -> int:
    """Remove `name`, what was left of its downloads, and what was derived from it; return the bytes freed.

    Raises `ModelNotFound` if there is nothing to remove, `DownloadError` while it is being pulled.
    """
    folder, downloads = folder_of(name), downloads_of(name)
    # '', '.' and '..' are no names: their folders hold all models
    if safe_name(name) in ("", ".", "..") or not (os.path.exists(folder) or os.path.exists(downloads)):
        raise ModelNotFound(f"{name!r} is not in the cache {cache_dir()}; `edgelm list` shows what is")
    with pull_lock(name, waiting=None):
        model = _read_manifest(folder)
        freed = _tree_bytes(folder) + _tree_bytes(downloads)
        if model is not None:
            freed += _remove_derived(model)
        # The manifest goes first: what remains after a kill is not a model.
        (folder / MANIFEST).unlink(missing_ok=True)
        for tree in (folder, downloads):
            if tree.exists():
                shutil.rmtree(tree)
        if model is not None and model.source == "hub":
            freed += _remove_shared(model)
    return freed


@contextmanager
def pull_lock(name: str, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold the lock of `name` among all processes; `waiting` is called once if another has it.

    With `waiting=None` raises `DownloadError` instead of waiting; so it does where nothing can be written.
    """
    from filelock import FileLock, Timeout  # brings asyncio along: only who pulls pays for it

    folder = cache_dir() / "locks"
    lock = FileLock(folder / f"{safe_name(name)}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        if waiting is None:
            raise DownloadError(f"{name} is being pulled by another process; wait for it to end") from None
        waiting()
        lock.acquire()
    except OSError as error:
        raise DownloadError(
            f"{cache_dir()} cannot be written ({error.strerror or error}); set EDGELM_CACHE to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def now_s() -> float:
    return time.time()


def _read_manifest(folder: Path) -> CachedModel | None:
    try:
        fields = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        fields["files"] = tuple(str(folder / file) for file in fields["files"])
        fields["file"] = str(folder / fields["file"])
        return CachedModel(**fields)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # no manifest that this version can read: not registered, and a pull replaces it


def _remove_derived(model: CachedModel) -> int:
    """Delete the tokenizer tables and all other files that were made of the model."""
    from edgelm.files import drafts, kept, prepared
    from edgelm.text.cache import default_folder

    try:
        key = _fingerprint(model.path)
    except EdgeLMError:
        return 0  # what cannot be read left nothing
    freed = prepared.remove(key) + drafts.remove(key) + kept.remove(key)
    for tables in default_folder().glob(f"{key}-*.tables"):
        freed += tables.stat().st_size
        tables.unlink()
    return freed


def remove_prefixes(path: Path | None = None) -> int:
    """Remove the kept system messages of the model at `path`, or of all models; return the bytes freed.

    Raises what opening a model raises.
    """
    from edgelm.files import kept

    return kept.remove(_fingerprint(path) if path is not None else "")


def remove_prepared(path: Path | None = None) -> int:
    """Remove what backends prepared of the model at `path`, or of all models; return the bytes freed.

    Raises what opening a model raises.
    """
    from edgelm.files import prepared

    return prepared.remove(_fingerprint(path) if path is not None else "")


def remove_drafts(path: Path | None = None) -> int:
    """Remove the low-bit copies of the model at `path`, or of all models; return the bytes freed.

    Raises what opening a model raises.
    """
    from edgelm.files import drafts

    return drafts.remove(_fingerprint(path) if path is not None else "")


def _fingerprint(path: Path) -> str:
    if path.is_dir():
        from edgelm.files.folder import fingerprint_of, read_folder

        return fingerprint_of(read_folder(path))
    from edgelm.files.gguf import open_model

    return open_model(path).fingerprint


def _remove_shared(model: CachedModel) -> int:
    """Delete a hub model's files from the shared hub cache; blobs that another snapshot links to stay."""
    freed = 0
    for file in map(Path, model.files):
        blob = file.resolve()
        if blob == file and file.exists():  # a file system without links: the file is the blob
            freed += file.stat().st_size
        file.unlink(missing_ok=True)
        snapshots = next((parent for parent in file.parents if parent.name == "snapshots"), None)
        links = snapshots.rglob("*") if snapshots is not None else ()
        if blob != file and blob.exists() and not any(link.resolve() == blob for link in links if link.is_symlink()):
            freed += blob.stat().st_size
            blob.unlink()
    return freed


def _tree_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) if root.is_dir() else 0
