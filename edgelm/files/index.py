"""Open a model that was opened before without reading its header again.

The small part of a header (numbers, texts, the tensor table) is kept as JSON beside the other derived files, keyed by
path, size and time of change. Arrays, above all the vocabulary, are not kept: who asks for one reads the header.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.hashing import blake2b

VERSION = 1
_SCALARS = (str, int, float, bool)


def open_indexed(path: str | os.PathLike[str]) -> ModelFile:
    """Return what `open_model` returns, from the index where that is up to date. Raises what `open_model` raises."""
    first = Path(path).absolute()
    place = cache_dir() / "headers" / f"{blake2b(str(first).encode(), digest_size=10).hexdigest()}.json"
    kept = read_json(place)
    if kept is not None and kept.get("version") == VERSION:
        try:
            if kept["facts"] == _facts([Path(part) for part in kept["paths"]]):
                return _restored(kept)
        except (OSError, KeyError, TypeError, ValueError, IndexError):
            pass  # moved, or not ours: the header itself decides
    from edgelm.files.gguf import open_model  # the parser: a model known from before does without

    model = open_model(first)
    write_json(place, _kept(model))
    return model


class _LazyMetadata(Mapping[str, Any]):
    """Metadata whose arrays are read from the file when somebody asks for one."""

    def __init__(self, path: Path, scalars: dict[str, Any], arrays: list[str]) -> None:
        self._path, self._scalars, self._arrays = path, scalars, frozenset(arrays)
        self._keys = (*scalars, *arrays)
        self._whole: Mapping[str, Any] | None = None

    def __getitem__(self, key: str) -> Any:
        if key in self._scalars:
            return self._scalars[key]
        if key not in self._arrays:
            raise KeyError(key)
        if self._whole is None:
            from edgelm.files.gguf import open_model

            self._whole = open_model(self._path).metadata
        return self._whole[key]

    def __contains__(self, key: object) -> bool:
        return key in self._scalars or key in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def _facts(paths: list[Path]) -> list[list[int]]:
    stats = [os.stat(path) for path in paths]
    return [[stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns] for stat in stats]


def _kept(model: ModelFile) -> dict[str, Any]:
    return {
        "version": VERSION,
        "paths": [str(path) for path in model.paths],
        "facts": _facts(list(model.paths)),
        "scalars": {key: value for key, value in model.metadata.items() if isinstance(value, _SCALARS)},
        "arrays": [key for key, value in model.metadata.items() if not isinstance(value, _SCALARS)],
        "tensors": [
            [info.name, int(info.type), info.shape, info.file, info.offset, info.n_bytes]
            for info in model.tensors.values()
        ],
        "architecture": model.architecture,
        "header_bytes": model.header_bytes,
        "file_bytes": model.file_bytes,
        "fingerprint": model.fingerprint,
    }


def _restored(kept: dict[str, Any]) -> ModelFile:
    paths = tuple(Path(path) for path in kept["paths"])
    tensors = {
        name: TensorInfo(name, TensorType(kind), tuple(shape), file, offset, n_bytes)
        for name, kind, shape, file, offset, n_bytes in kept["tensors"]
    }
    return ModelFile(
        paths=paths,
        metadata=_LazyMetadata(paths[0], kept["scalars"], kept["arrays"]),
        tensors=MappingProxyType(tensors),
        architecture=kept["architecture"],
        header_bytes=kept["header_bytes"],
        file_bytes=tuple(kept["file_bytes"]),
        fingerprint=kept["fingerprint"],
    )
