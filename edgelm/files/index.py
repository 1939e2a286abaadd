"""Open a model that was opened before without reading its header again.

The small part of a header (numbers, texts, the tensor table) is kept as JSON beside the other derived files, keyed by
path, size and time of change. Long arrays, above all the vocabulary, are not kept: who asks for one reads the header.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.files.model import ModelFile
from edgelm.files.pack import open_pack, refuse_lost_footer
from edgelm.files.summary import restored, summary_of
from edgelm.hashing import blake2b

GENAI_CONFIG = "genai_config.json"
VERSION = 2
_FOLDER_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def open_indexed(path: str | os.PathLike[str]) -> ModelFile:
    """Return what `open_model` returns, from the index where that is up to date; of a pack, from its own index.

    Raises what `open_model` raises, and `DamagedPack`.
    """
    first = Path(path).absolute()
    if (packed := open_pack(first)) is not None:
        return packed
    place = cache_dir() / "headers" / f"{blake2b(str(first).encode(), digest_size=10).hexdigest()}.json"
    kept = read_json(place)
    if kept is not None and kept.get("version") == VERSION:
        try:
            paths = tuple(Path(part) for part in kept["paths"])
            if kept["facts"] == (facts := _facts(paths)):
                return restored(kept, paths, tuple(size for _, _, size, _ in facts))
        except (OSError, KeyError, TypeError, ValueError, IndexError):
            pass  # moved, or not ours: the header itself decides
    from edgelm.files.gguf import open_model  # the parser: a model known from before does without

    model = open_model(first)
    refuse_lost_footer(model)
    write_json(place, _kept(model))
    return model


def content_key(model: ModelFile) -> str:
    """Return a key of a model's weights, without reading them: of a pack its checksums, else what `stat` says.

    Moved within a file system, a file keeps its key.
    """
    digest = blake2b(model.fingerprint.encode(), digest_size=16)
    for part in model.checksums:
        digest.update(part.sums)
    if not model.checksums:
        digest.update(repr([facts[1:] for facts in _facts(model.paths)]).encode())  # devices are numbered at each start
    return digest.hexdigest()


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Say whether `path` is a model folder: `edgelm.files.folder.read_folder` reads those."""
    return any(os.path.isfile(os.path.join(path, name)) for name in _FOLDER_FILES)


def is_genai_folder(path: str | os.PathLike[str]) -> bool:
    """Say whether `path` is a folder of onnxruntime-genai: `edgelm.files.genai.read_genai_folder` reads those."""
    return os.path.isfile(os.path.join(path, GENAI_CONFIG))


def _facts(paths: Sequence[Path]) -> list[list[int]]:
    stats = [os.stat(path) for path in paths]
    return [[stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns] for stat in stats]


def _kept(model: ModelFile) -> dict[str, Any]:
    return {
        "version": VERSION,
        "paths": [str(path) for path in model.paths],
        "facts": _facts(model.paths),
        **summary_of(model),
    }
