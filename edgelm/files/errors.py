"""What can be wrong with a model file, one class per thing that a caller could do something different about."""

from __future__ import annotations

from edgelm.errors import ModelFileError


class NotAModelFile(ModelFileError):
    """A folder, a web page, an empty file, a pointer, another format: not a damaged model, but none at all."""


class TruncatedFile(ModelFileError):
    """The file ends before what it promises; usually a download that stopped."""


class BadHeader(ModelFileError):
    """The header contradicts itself, the file's size, or the limits of edgelm."""


class BadTensor(BadHeader):
    """An entry of the tensor table cannot be true."""


class DamagedPack(ModelFileError):
    """What edgelm appended to a GGUF file to make it a pack is not what was written; the message names the section."""

    def __init__(self, path: object, fact: str, hint: str = "copy or pack the model again") -> None:
        super().__init__(path, fact, hint)


class DamagedCache(ModelFileError):
    """Saved keys and values that are not what was written, or of another model."""

    def __init__(self, path: object, fact: str) -> None:
        super().__init__(path, fact, "remove it: it is made anew")


class DamagedWeights(DamagedPack):
    """Rows of a tensor do not match the checksum in the pack, also when they are read again."""


class SplitFileError(ModelFileError):
    """The parts of a split model do not make one model."""


class NotFirstPart(SplitFileError):
    """A later part was opened; part 1 is the one to open."""


class MissingPart(SplitFileError):
    """A part of a split model is not beside the others."""


class DuplicatePart(SplitFileError):
    """Two parts of a split model hold the same thing."""


class MismatchedPart(SplitFileError):
    """A part belongs to another model, or its numbers differ from its name."""
