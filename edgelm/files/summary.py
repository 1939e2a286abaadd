"""A model's header without its long arrays, as plain JSON values, and back.

What stays out, above all the vocabulary, is read from the header when somebody asks for it. Checks what it restores;
knows nothing of where summaries are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.model import ModelFile, TensorInfo

SHORT_ARRAY = 1024
"""Numbers that an array may have to be kept: those of layers, not those of tokens."""
_SCALARS = (str, int, float, bool)


def summary_of(model: ModelFile) -> dict[str, Any]:
    """Return what `restored` needs besides paths and sizes."""
    arrays = {key: value for key, value in model.metadata.items() if not isinstance(value, _SCALARS)}
    short = {key: value for key, value in arrays.items() if isinstance(value, np.ndarray) and len(value) <= SHORT_ARRAY}
    return {
        "scalars": {key: value for key, value in model.metadata.items() if isinstance(value, _SCALARS)},
        "numbers": {key: [value.dtype.str, value.tolist()] for key, value in short.items()},
        "arrays": [key for key in arrays if key not in short],
        "tensors": [
            [info.name, int(info.type), info.shape, info.file, info.offset, info.n_bytes, info.row_step]
            for info in model.tensors.values()
        ],
        "architecture": model.architecture,
        "header_bytes": model.header_bytes,
        "fingerprint": model.fingerprint,
    }


def restored(summary: Mapping[str, Any], paths: tuple[Path, ...], file_bytes: tuple[int, ...]) -> ModelFile:
    """Return the model of a summary. Raises `KeyError`, `TypeError`, `ValueError` or `IndexError` for nonsense."""
    tensors = {entry[0]: _tensor(entry, file_bytes) for entry in summary["tensors"]}
    scalars = dict(summary["scalars"])
    scalars |= {key: np.array(values, dtype) for key, (dtype, values) in summary["numbers"].items()}
    architecture, header_bytes = summary["architecture"], summary["header_bytes"]
    if not isinstance(architecture, str) or not isinstance(header_bytes, int):
        raise TypeError("architecture or header_bytes")
    return ModelFile(
        paths=paths,
        metadata=_LazyMetadata(paths[0], scalars, summary["arrays"]),
        tensors=MappingProxyType(tensors),
        architecture=architecture,
        header_bytes=header_bytes,
        file_bytes=file_bytes,
        fingerprint=str(summary["fingerprint"]),
    )


def _tensor(entry: list[Any], file_bytes: tuple[int, ...]) -> TensorInfo:
    name, kind, shape, file, offset, n_bytes, row_step = entry
    info = TensorInfo(name, TensorType(kind), tuple(shape), file, offset, n_bytes, row_step)
    implied = math.prod(info.shape[1:]) * row_bytes(info.type, info.shape[0])
    inside = file >= 0 and 0 <= offset <= offset + n_bytes <= file_bytes[file]
    if not isinstance(name, str) or min(info.shape) < 1 or n_bytes != implied or not inside or row_step < 1:
        raise ValueError(f"tensor {name!r}")
    return info


class _LazyMetadata(Mapping[str, Any]):
    """Metadata whose long arrays are read from the file when somebody asks for one."""

    def __init__(self, path: Path, kept: dict[str, Any], arrays: list[str]) -> None:
        self._path, self._kept, self._arrays = path, kept, frozenset(arrays)
        self._keys = (*kept, *arrays)
        self._whole: Mapping[str, Any] | None = None

    def __getitem__(self, key: str) -> Any:
        if key in self._kept:
            return self._kept[key]
        if key not in self._arrays:
            raise KeyError(key)
        if self._whole is None:
            from edgelm.files.gguf import open_model

            self._whole = open_model(self._path).metadata
        return self._whole[key]

    def __contains__(self, key: object) -> bool:
        return key in self._kept or key in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
