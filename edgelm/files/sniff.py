"""Tell from a file's first bytes what it is, when it is not GGUF.

Knows other formats by their beginnings only, to say one helpful sentence.
"""

from __future__ import annotations

from pathlib import Path

from edgelm.files.errors import NotAModelFile, TruncatedFile

MAGIC = b"GGUF"
HEAD_BYTES = 64

_OLD_GGML = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # ggml, ggmf, ggjt, ggla as little-endian words
_WEB_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")
_OTHERS = (
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint, not a GGUF model", "convert it to GGUF, or unpack it"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd"),
    (b"\x89HDF", "an HDF5 file, not a GGUF model", "convert it to GGUF"),
)


def check_magic(path: Path, head: bytes, file_bytes: int) -> None:
    """Return if `head`, the first `HEAD_BYTES` of the file, begins like GGUF; else raise `NotAModelFile`.

    Raises `TruncatedFile` if the file is a beginning of a GGUF file and too short to say its version.
    """
    if file_bytes == 0:
        raise NotAModelFile(path, "the file is empty (0 bytes)")
    if head.startswith(MAGIC) or (MAGIC.startswith(head) and file_bytes < len(MAGIC)):
        if file_bytes < len(MAGIC) + 4:
            raise TruncatedFile(path, f"the file ends after {file_bytes} bytes, inside its header")
        return
    fact, hint = _describe(head)
    raise NotAModelFile(path, fact, hint)


def _describe(head: bytes) -> tuple[str, str]:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the model itself", "run `git lfs pull`, or download the file itself"
    if text.startswith(_WEB_PAGES):
        return "this is a web page, not a model", "download the file itself, not the page about it"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return "this is a safetensors file, a part of a model", "give the path of the folder with its config.json"
    if text.startswith((b"{", b"[")):
        return "this is JSON text, not a model", "if it holds an error message, act on it and download the file again"
    if head.startswith(_OLD_GGML):
        return "this is a model in a format older than GGUF", "convert the model again, or get its GGUF file"
    for magic, fact, hint in _OTHERS:
        if head.startswith(magic):
            return f"this is {fact}", hint
    if not head.strip(b"\0"):
        return "the file begins with zeros, so its download never wrote them", "download the file again"
    return f"this is not a GGUF model: it begins with {head[:4]!r} instead of {MAGIC!r}", "give the path of a GGUF file"
