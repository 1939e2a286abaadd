"""One small bad file for each way a GGUF file can be wrong, and the error that it must raise."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import EdgeLMError, ModelFileError, ModelNotFound, UnsupportedModel
from edgelm.files import BadHeader, BadTensor, NotAModelFile, TensorType, TruncatedFile, cursor, header, open_model
from edgelm.files.index import open_indexed
from edgelm.testing import TensorData, tiny_model, write_gguf
from edgelm.testing.gguf_writer import string

F32 = TensorType.F32
META = {"general.architecture": "llama"}
ONE = [TensorData("a", F32, (8, 2), bytes(64))]
TWO = [*ONE, TensorData("b", F32, (8,), bytes(32))]


def raw_gguf(*parts: bytes, version: int = 3, n_tensors: int = 0, n_keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(parts)


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str = "a", dims: tuple[int, ...] = (8, 2), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def array(kind: int, n: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + data


ARCH = key("general.architecture", 8, string("llama"))
PAD = bytes(256)
U64_MAX = 2**64 - 1


def with_tensor(entry: bytes, *more: bytes, data: bytes = PAD) -> bytes:
    return raw_gguf(ARCH, entry, *more, data, n_tensors=1 + len(more), n_keys=1)


def with_key(entry: bytes) -> bytes:
    return raw_gguf(ARCH, entry, PAD, n_keys=2)


BAD: dict[str, tuple[bytes, type[EdgeLMError], str]] = {
    # not a model at all
    "empty": (b"", NotAModelFile, "is empty"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", NotAModelFile, "web page"),
    "web page after blanks": (b"\n\n  <HTML lang=en>", NotAModelFile, "web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", NotAModelFile, "git lfs pull"),
    "safetensors": (struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}}', NotAModelFile, "safetensors"),
    "json error": (b'{"error": "not found"}', NotAModelFile, "JSON"),
    "zip": (b"PK\x03\x04" + PAD, NotAModelFile, "PyTorch"),
    "gzip": (b"\x1f\x8b\x08" + PAD, NotAModelFile, "gunzip"),
    "old ggml": (b"tjgg" + PAD, NotAModelFile, "older than GGUF"),
    "zeros": (PAD, NotAModelFile, "begins with zeros"),
    "something else": (b"\x7fELF" + PAD, NotAModelFile, "ELF"),
    # versions and byte order
    "version 0": (raw_gguf(ARCH, version=0, n_keys=1), BadHeader, "version 0"),
    "version 1": (raw_gguf(ARCH, version=1, n_keys=1), UnsupportedModel, "version 1"),
    "version 4": (raw_gguf(ARCH, version=4, n_keys=1), UnsupportedModel, "newer"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + PAD, UnsupportedModel, "big-endian"),
    # the file ends early
    "half a magic": (b"GG", TruncatedFile, "ends after 2 bytes"),
    "no version": (b"GGUF\x03", TruncatedFile, "inside its header"),
    "no counts": (b"GGUF\x03\0\0\0\x01\0", TruncatedFile, "inside its header"),
    "inside a key": (raw_gguf(ARCH[:16], n_keys=1), TruncatedFile, "inside its header"),
    "inside a table": (raw_gguf(ARCH, tensor() + tensor("b")[:30], n_tensors=2, n_keys=1), TruncatedFile, "header"),
    "data cut off": (with_tensor(tensor(), data=bytes(40)), TruncatedFile, "its tensors reach to"),
    "data far away": (with_tensor(tensor(offset=2**40)), TruncatedFile, "its tensors reach to"),
    "no data": (with_tensor(tensor(), data=b""), TruncatedFile, "its tensors reach to"),
    # counts that the file cannot hold, or nobody should
    "many tensors": (raw_gguf(ARCH, n_tensors=2**62, n_keys=1), BadHeader, "promises 4611686018427387904 tensors"),
    "more tensors than bytes": (raw_gguf(ARCH, n_tensors=5000, n_keys=1), TruncatedFile, "promises 5000 tensors"),
    "many keys": (raw_gguf(ARCH, n_keys=U64_MAX), BadHeader, "metadata keys"),
    "more keys than bytes": (raw_gguf(ARCH, n_keys=5000), TruncatedFile, "promises 5000 metadata keys"),
    # keys
    "empty key in 37 bytes": (raw_gguf(key("", 0, b"\0"), n_keys=1), BadHeader, "key 0 is empty"),
    "long key": (raw_gguf(struct.pack("<Q", 70_000), PAD, n_keys=1), BadHeader, "70000 bytes"),
    "endless key": (raw_gguf(struct.pack("<Q", U64_MAX), PAD, n_keys=1), BadHeader, "more than"),
    "key is not text": (with_key(key(b"\xff\xfe", 0, b"\0")), BadHeader, "not UTF-8"),
    "key twice": (with_key(ARCH), BadHeader, "appears twice"),
    "unknown value type": (with_key(key("k", 13, PAD)), BadHeader, "unknown type 13"),
    "long string": (with_key(key("k", 8, struct.pack("<Q", 2**30))), BadHeader, "the string 'k'"),
    "string past the end": (with_key(key("k", 8, struct.pack("<Q", 5000))), TruncatedFile, "inside its header"),
    "bad truth value": (with_key(key("k", 7, b"\x02")), BadHeader, "neither 0 nor 1"),
    # arrays
    "array of arrays": (with_key(key("k", 9, array(9, 1))), BadHeader, "array of arrays"),
    "unknown item type": (with_key(key("k", 9, array(99, 1))), BadHeader, "unknown type 99"),
    "endless array": (with_key(key("k", 9, array(4, U64_MAX))), BadHeader, "items"),
    "array past the end": (with_key(key("k", 9, array(4, 1000))), TruncatedFile, "promises 1000 items"),
    "strings past the end": (with_key(key("k", 9, array(8, 1000))), TruncatedFile, "promises 1000 items"),
    "endless string in array": (
        with_key(key("k", 9, array(8, 2, string("a") + struct.pack("<Q", U64_MAX)))),
        BadHeader,
        "k[1] has",
    ),
    "string in array past the end": (
        with_key(key("k", 9, array(8, 2, string("a") + struct.pack("<Q", 4000)))),
        TruncatedFile,
        "inside its header",
    ),
    "bad truth values": (with_key(key("k", 9, array(7, 2, b"\x01\x07"))), BadHeader, "truth values"),
    # alignment
    "alignment 0": (with_key(key("general.alignment", 4, struct.pack("<I", 0))), BadHeader, "power of two"),
    "alignment 24": (with_key(key("general.alignment", 4, struct.pack("<I", 24))), BadHeader, "power of two"),
    "huge alignment": (with_key(key("general.alignment", 4, struct.pack("<I", 2**31))), BadHeader, "power of two"),
    "alignment is text": (with_key(key("general.alignment", 8, string("32"))), BadHeader, "not a whole number"),
    # tensors
    "tensor without a name": (with_tensor(tensor("")), BadTensor, "name of tensor 0"),
    "tensor with a long name": (with_tensor(tensor("x" * 200)), BadTensor, "200 bytes"),
    "tensor name is not text": (with_tensor(tensor("ab").replace(b"ab", b"\xff\xff")), BadTensor, "not UTF-8"),
    "tensor twice": (with_tensor(tensor(), tensor(offset=64)), BadTensor, "two tensors are called 'a'"),
    "no dimensions": (with_tensor(tensor(dims=())), BadTensor, "0 dimensions"),
    "five dimensions": (with_tensor(tensor(dims=(8, 1, 1, 1, 1))), BadTensor, "5 dimensions"),
    "many dimensions": (with_tensor(string("a") + struct.pack("<I", 2**32 - 1)), BadTensor, "4294967295 dimensions"),
    "dimension 0": (with_tensor(tensor(dims=(8, 0))), BadTensor, "size 0"),
    "endless dimension": (with_tensor(tensor(dims=(2**63,))), BadTensor, "larger than any file"),
    "product overflows": (with_tensor(tensor(dims=(2**33, 2**33))), BadTensor, "larger than any file"),
    "removed type": (with_tensor(tensor(kind=4)), UnsupportedModel, "Q4_2"),
    "unknown type": (with_tensor(tensor(kind=99)), UnsupportedModel, "id 99"),
    "half a block": (with_tensor(tensor(dims=(40, 2), kind=2)), BadTensor, "Q4_0 blocks of 32"),
    "offset not aligned": (with_tensor(tensor(offset=8)), BadTensor, "not at a multiple of 32"),
    "overlap": (with_tensor(tensor(), tensor("b", offset=32)), BadTensor, "'a' and 'b' overlap"),
    "same place": (with_tensor(tensor(), tensor("b")), BadTensor, "overlap"),
    "offset wraps around": (with_tensor(tensor(offset=U64_MAX - 31)), TruncatedFile, "its tensors reach to"),
    # what a model must say
    "no architecture": (raw_gguf(PAD), BadHeader, "does not name an architecture"),
    "architecture is a number": (
        raw_gguf(key("general.architecture", 4, bytes(4)), PAD, n_keys=1),
        BadHeader,
        "does not name an architecture",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_raises_its_own_error(name: str, tmp_path: Path) -> None:
    data, kind, fact = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(EdgeLMError) as caught:
        open_model(path)
    assert type(caught.value) is kind
    assert fact in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value), "a fact needs a next step"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_model(tmp_path / "nothing.gguf")


def test_a_folder_names_a_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(NotAModelFile, match=r"folder.*holds no \.gguf"):
        open_model(tmp_path)
    write_gguf(tmp_path / "b.gguf", META, ONE)
    with pytest.raises(NotAModelFile, match=r"such as .*b\.gguf"):
        open_model(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(NotAModelFile, match="pipe"):
        open_model(tmp_path / "pipe.gguf")
    with pytest.raises(NotAModelFile, match="pipe"):
        open_indexed(tmp_path / "pipe.gguf")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", META, ONE)
    path.chmod(0)
    with pytest.raises(ModelFileError, match="permission"):
        open_model(path)


def test_a_path_with_a_zero_byte() -> None:
    with pytest.raises(ModelFileError, match="cannot be opened"):
        open_model("a\0b.gguf")


def test_a_header_longer_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cursor, "MAX_HEADER_BYTES", 4096)
    monkeypatch.setattr(cursor, "WINDOW_BYTES", 256)
    path = write_gguf(tmp_path / "a.gguf", {**META, "k": np.zeros(2000, np.uint32)}, ONE)
    with pytest.raises(BadHeader, match="header is longer than"):
        open_model(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {**META, "k": ["x"] * 100}, ONE)
    fd = os.open(path, os.O_RDONLY)
    try:
        with cursor.Cursor(fd, path, path.stat().st_size) as walker:
            os.truncate(path, 50)
            with pytest.raises(TruncatedFile, match="became shorter"):
                walker.take(100)
    finally:
        os.close(fd)


@pytest.mark.parametrize("window_bytes", [17, 1000])
def test_every_truncation_of_a_model_is_noticed(
    window_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "WINDOW_BYTES", window_bytes)
    whole = write_gguf(tmp_path / "a.gguf", {**META, "k": ["ab", "", "c"], "n": [1, 2]}, TWO).read_bytes()
    path = tmp_path / "cut.gguf"
    for n_bytes in range(1, len(whole)):
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(TruncatedFile):
            open_model(path)
    path.write_bytes(whole)
    assert list(open_model(path).metadata["k"]) == ["ab", "", "c"]


@pytest.mark.parametrize(
    "limit", ["MAX_KEYS", "MAX_TENSORS", "MAX_STRING_BYTES", "MAX_ARRAY_ITEMS", "MAX_TENSOR_NAME_BYTES"]
)
def test_each_limit_is_applied(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(tmp_path / "a.gguf", "llama", n_layers=1)
    open_model(path)
    monkeypatch.setattr(header, limit, 2)
    with pytest.raises(BadHeader):
        open_model(path)
