"""One small bad file for each way a safetensors file can be wrong, and the error that it must raise."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.errors import EdgeLMError, ModelNotFound, UnsupportedModel
from edgelm.files import BadHeader, BadTensor, NotAModelFile, TruncatedFile, safetensors
from edgelm.files.safetensors import read_arrays

MAX_S = 1.0
MAX_EXTRA_BYTES = 2_000_000  # of a file of a few hundred bytes


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def of(entries: Any, data: bytes = bytes(64)) -> bytes:
    return raw(json.dumps(entries).encode(), data)


def entry(dtype: Any = "F32", shape: Any = (8, 2), start: Any = 0, stop: Any = 64, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


GOOD = of({"a": entry(), "__metadata__": {"format": "pt"}})
HUGE = 2**62

BAD: dict[str, tuple[bytes, type[EdgeLMError], str]] = {
    "empty": (b"", NotAModelFile, "is empty"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", NotAModelFile, "Git LFS"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", BadHeader, "bytes, more than"),
    "seven bytes": (b"\x01\0\0\0\0\0\0", TruncatedFile, "inside its header"),
    "header too long": (struct.pack("<Q", 2**40) + b"{}", BadHeader, "1099511627776 bytes, more than"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", TruncatedFile, "but only"),
    "no header": (raw(b""), BadHeader, "not a JSON object"),
    "list": (raw(b"[1]"), BadHeader, "not a JSON object"),
    "blank before": (raw(b' {"a":1}'), BadHeader, "not a JSON object"),
    "cut JSON": (raw(b'{"a": '), BadHeader, "not sound JSON"),
    "not UTF-8": (raw(b'{"\xff\xfe": 1}'), BadHeader, "not sound JSON"),
    "deep": (raw(b'{"a":' + b"[" * 100_000), BadHeader, "nested too deeply"),
    "NaN": (raw(b'{"a": NaN}'), BadHeader, "NaN is no number"),
    "long number": (raw(b'{"a": ' + b"9" * 10_000 + b"}"), BadHeader, "not sound JSON"),
    "name twice": (raw(b'{"a": 1, "b": 2, "a": 1}'), BadHeader, "'a' stands twice"),
    "key twice": (raw(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), BadHeader, "'dtype' stands twice"),
    "metadata is a list": (of({"__metadata__": [1]}, b""), BadHeader, "not an object of strings"),
    "metadata of numbers": (of({"__metadata__": {"a": 1}}, b""), BadHeader, "not an object of strings"),
    "empty name": (of({"": entry()}), BadTensor, "is empty or longer"),
    "long name": (of({"x" * 256: entry()}), BadTensor, "is empty or longer"),
    "no description": (of({"a": 1}), BadTensor, "is not described"),
    "no shape": (of({"a": {"dtype": "F32", "data_offsets": [0, 64]}}), BadTensor, "is not described"),
    "one key too many": (of({"a": entry(more=1)}), BadTensor, "is not described"),
    "unknown type": (of({"a": entry("Q4_0")}), UnsupportedModel, "'Q4_0'"),
    "type is a list": (of({"a": entry(["F32"])}), UnsupportedModel, "does not know"),
    "shape is text": (of({"a": entry(shape="8")}), BadTensor, "has the shape"),
    "shape of floats": (of({"a": entry(shape=[8.0, 2])}), BadTensor, "has the shape"),
    "shape of truths": (of({"a": entry(shape=[True, 16])}), BadTensor, "has the shape"),
    "negative size": (of({"a": entry(shape=[-8, -2])}), BadTensor, "has the shape"),
    "many dimensions": (of({"a": entry(shape=[1] * 9)}), BadTensor, "has the shape"),
    "size 0": (of({"a": entry(shape=[8, 0], stop=0)}), BadTensor, "size 0"),
    "huge size": (of({"a": entry(shape=[HUGE, HUGE])}), BadTensor, "larger than any file"),
    "size beyond 64 bits": (of({"a": entry(shape=[2**64])}), BadTensor, "has the shape"),
    "one offset": (of({"a": {**entry(), "data_offsets": [0]}}), BadTensor, "not between two offsets"),
    "offset is text": (of({"a": entry(start="0")}), BadTensor, "not between two offsets"),
    "negative offset": (of({"a": entry(start=-64, stop=0)}), BadTensor, "not between two offsets"),
    "backwards": (of({"a": entry(start=64, stop=0)}), BadTensor, "say otherwise"),
    "too few bytes": (of({"a": entry(stop=60)}), BadTensor, "takes 64 bytes"),
    "too many bytes": (of({"a": entry(stop=68)}), BadTensor, "takes 64 bytes"),
    "overlap": (of({"a": entry(), "b": entry(start=32, stop=96)}, bytes(96)), BadTensor, "'a' and 'b' overlap"),
    "same place": (of({"a": entry(), "b": entry()}), BadTensor, "overlap"),
    "hole": (of({"a": entry(), "b": entry(start=68, stop=132)}, bytes(132)), BadTensor, "belong to no tensor"),
    "hole at the front": (of({"a": entry(start=4, stop=68)}, bytes(68)), BadTensor, "belong to no tensor"),
    "data cut off": (of({"a": entry()}, bytes(63)), TruncatedFile, "its tensors reach to"),
    "no data": (of({"a": entry()}, b""), TruncatedFile, "its tensors reach to"),
    "data left": (of({"a": entry()}, bytes(65)), BadHeader, "1 bytes at the end"),
    "data far away": (of({"a": entry(start=HUGE, stop=HUGE + 64)}), BadTensor, "belong to no tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_raises_its_own_error(name: str, tmp_path: Path) -> None:
    data, kind, fact = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(EdgeLMError) as caught:
        read_arrays(path)
    assert type(caught.value) is kind
    assert fact in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value), "a fact needs a next step"


def test_a_sound_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    rng = np.random.default_rng(1)
    kinds = {"F16": np.float16, "F32": np.float32, "U32": np.uint32, "I8": np.int8, "F64": np.float64, "BOOL": np.bool_}
    given = {f"{name}.{n}": rng.integers(0, 2, (n, 3)).astype(kind) for name, kind in kinds.items() for n in (1, 2, 5)}
    library.save_file(given | {"scalar": np.array(3.0, np.float32)}, path, {"format": "pt"})
    found, theirs, content = read_arrays(path), library.load_file(path), path.read_bytes()
    assert {array.name for array in found.arrays} == theirs.keys()
    for array in found.arrays:
        values = np.frombuffer(content, kinds[array.dtype], int(np.prod(array.shape)), array.offset)
        assert np.array_equal(values.reshape(array.shape), theirs[array.name])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        read_arrays(tmp_path / "nothing.safetensors")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EdgeLMError, match=r"not an ordinary file|cannot be opened"):
        read_arrays(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotAModelFile, match="ordinary"):
        read_arrays(tmp_path / "pipe")


@pytest.mark.parametrize("limit", ["MAX_HEADER_BYTES", "MAX_TENSORS"])
def test_each_limit_is_applied(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD)
    read_arrays(path)
    monkeypatch.setattr(safetensors, limit, 0)
    with pytest.raises(BadHeader):
        read_arrays(path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for n_bytes in range(1, len(GOOD)):
        path.write_bytes(GOOD[:n_bytes])
        with pytest.raises(TruncatedFile):
            read_arrays(path)


def opens_or_raises(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    started = time.process_time()
    tracemalloc.start()
    try:
        for array in read_arrays(path).arrays:
            assert 0 <= array.offset <= array.offset + array.n_bytes <= len(data)
    except EdgeLMError as error:
        assert "; " in str(error)  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - started < MAX_S
    assert peak < MAX_EXTRA_BYTES


SEED = of({"__metadata__": {"a": "b"}, "a": entry(), "b.weight": entry("F16", [4], 64, 72)}, bytes(72))
fuzzed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzzed
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(SEED)
    for at, value in changes:
        data[at % len(data)] = value
    opens_or_raises(bytes(data), tmp_path / "a.safetensors")


@fuzzed
@given(start=st.integers(0, 2**16), n_gone=st.integers(0, 40), extra=st.binary(max_size=24))
def test_bytes_gone_or_added(tmp_path: Path, start: int, n_gone: int, extra: bytes) -> None:
    start %= len(SEED)
    opens_or_raises(SEED[:start] + extra + SEED[start + n_gone :], tmp_path / "a.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "U8"]) | json_values, "shape": json_values, "data_offsets": json_values}
)


@fuzzed
@given(header=st.dictionaries(st.text(max_size=6), entries | json_values, max_size=4))
def test_any_header(tmp_path: Path, header: dict[str, Any]) -> None:
    opens_or_raises(of(header), tmp_path / "a.safetensors")
