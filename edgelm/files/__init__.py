"""Bytes on flash: GGUF headers, checked. Reads no weights; knows no architecture.

Names are imported when they are asked for: a child process that tries a backend needs the tensor types and no NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgelm.files.errors import (
        BadHeader,
        BadTensor,
        DamagedPack,
        DamagedWeights,
        DuplicatePart,
        MismatchedPart,
        MissingPart,
        NotAModelFile,
        NotFirstPart,
        SplitFileError,
        TruncatedFile,
    )
    from edgelm.files.ggml_types import TensorType, row_bytes
    from edgelm.files.gguf import open_model
    from edgelm.files.meta import Meta
    from edgelm.files.model import ModelFile, TensorInfo
    from edgelm.files.strings import StringArray

_HOMES = {
    "errors": "BadHeader BadTensor DamagedPack DamagedWeights DuplicatePart MismatchedPart MissingPart NotAModelFile "
    "NotFirstPart SplitFileError TruncatedFile",
    "ggml_types": "TensorType row_bytes",
    "gguf": "open_model",
    "meta": "Meta",
    "model": "ModelFile TensorInfo",
    "strings": "StringArray",
}

__all__ = [
    "BadHeader",
    "BadTensor",
    "DamagedPack",
    "DamagedWeights",
    "DuplicatePart",
    "Meta",
    "MismatchedPart",
    "MissingPart",
    "ModelFile",
    "NotAModelFile",
    "NotFirstPart",
    "SplitFileError",
    "StringArray",
    "TensorInfo",
    "TensorType",
    "TruncatedFile",
    "open_model",
    "row_bytes",
]


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"edgelm.files.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
