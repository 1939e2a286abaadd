"""Bytes on flash: GGUF headers, checked. Reads no weights; knows no architecture."""

from edgelm.files.errors import (
    BadHeader,
    BadTensor,
    DuplicatePart,
    MismatchedPart,
    MissingPart,
    NotAModelFile,
    NotFirstPart,
    SplitFileError,
    TruncatedFile,
)
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.gguf import ModelFile, TensorInfo, open_model
from edgelm.files.meta import Meta
from edgelm.files.strings import StringArray

__all__ = [
    "BadHeader",
    "BadTensor",
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
