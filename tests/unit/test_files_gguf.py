"""Opening GGUF files: what is in them, split files, and speed and agreement on real models."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.files import (
    DuplicatePart,
    MismatchedPart,
    MissingPart,
    NotFirstPart,
    StringArray,
    TensorType,
    cursor,
    open_model,
)
from edgelm.testing import TensorData, tiny_model, write_gguf, write_split_gguf

F32 = TensorType.F32
META: dict[str, Any] = {"general.architecture": "llama"}
TENSORS = [
    TensorData("a", F32, (8, 2), bytes(range(64))),
    TensorData("b", TensorType.Q4_0, (32, 3), b"b" * 54),
    TensorData("c", TensorType.F16, (2, 3, 4), b"c" * 48),
]
MODELS = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_lie_where_the_table_says(tmp_path: Path, version: int) -> None:
    path = write_gguf(tmp_path / "a.gguf", META, TENSORS, version=version)
    model = open_model(path)
    data = path.read_bytes()
    assert list(model.tensors) == ["a", "b", "c"]
    for tensor in TENSORS:
        info = model.tensors[tensor.name]
        assert (info.type, info.shape, info.file) == (tensor.type, tensor.shape, 0)
        assert data[info.offset : info.offset + info.n_bytes] == tensor.data
    assert model.tensors["c"].n_rows == 12
    assert model.tensors["b"].row_bytes == 18
    assert model.total_tensor_bytes == 64 + 54 + 48
    assert model.architecture == "llama"
    assert model.paths == (path,)
    assert model.file_bytes == (len(data),)
    assert data[model.header_bytes : model.tensors["a"].offset].strip(b"\0") == b""


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    path = write_gguf(tmp_path / "a.gguf", {**META, "general.alignment": alignment}, TENSORS)
    model = open_model(path)
    assert all(info.offset % alignment == 0 for info in model.tensors.values())
    assert path.read_bytes()[model.tensors["b"].offset :][:54] == b"b" * 54


def test_values_of_every_type(tmp_path: Path) -> None:
    scalars: dict[str, Any] = {
        str(np.dtype(kind)): np.dtype(kind).type(3) for kind in ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
    }
    arrays = {f"{name}s": np.asarray([1, 2, 3], value.dtype) for name, value in scalars.items()}
    floats = {"f": 0.5, "d": np.float64(0.1), "fs": [0.5, 1.5], "ds": np.asarray([0.1])}
    others = {
        "t": True,
        "ts": [True, False],
        "s": "Grüße",
        "ss": ["a", "", "é"],
        "none": np.zeros(0, np.int32),
        "e": [],
    }
    model = open_model(write_gguf(tmp_path / "a.gguf", {**META, **scalars, **arrays, **floats, **others}, []))
    read = model.metadata
    for name in scalars:
        assert read[name] == 3
        assert type(read[name]) is int
        assert np.array_equal(read[f"{name}s"], arrays[f"{name}s"])
        assert read[f"{name}s"].dtype == arrays[f"{name}s"].dtype
    assert (read["f"], read["d"], read["fs"].tolist(), read["ds"].tolist()) == (0.5, 0.1, [0.5, 1.5], [0.1])
    assert read["t"] is True
    assert read["ts"].tolist() == [True, False]
    assert read["s"] == "Grüße"
    assert read["ss"] == StringArray.of(["a", "", "é"])
    assert len(read["none"]) == len(read["e"]) == 0
    with pytest.raises(TypeError):
        read["s"] = "x"  # type: ignore[index]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    strings=st.lists(
        st.one_of(st.binary(max_size=8), st.integers(0, 700).map(bytes), st.just(b"\x01" + bytes(7)), st.just(b"")),
        max_size=60,
    ),
    window_bytes=st.sampled_from([8, 24, 100, 1000, 2**18]),
)
def test_strings_of_any_bytes_survive(tmp_path: Path, strings: list[bytes], window_bytes: int) -> None:
    """Also such that look like lengths: a byte before seven zeros."""
    path = write_gguf(tmp_path / "a.gguf", {**META, "k": strings, "after": 7}, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cursor, "WINDOW_BYTES", window_bytes)
        model = open_model(path)
    assert list(model.metadata["k"].iter_raw()) == strings
    assert model.metadata["after"] == 7
    assert model.fingerprint == open_model(path).fingerprint


def test_fingerprint(tmp_path: Path) -> None:
    first = open_model(tiny_model(tmp_path / "a.gguf", "llama"))
    assert open_model(shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")).fingerprint == first.fingerprint
    assert open_model(tiny_model(tmp_path / "c.gguf", "llama", rope_base=5.0)).fingerprint != first.fingerprint
    with (tmp_path / "b.gguf").open("ab") as file:
        file.write(b"\0")
    assert open_model(tmp_path / "b.gguf").fingerprint != first.fingerprint


def test_no_file_stays_open(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "a.gguf", "llama", n_parts=2)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    model = open_model(path)
    assert (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0) == before
    assert len(model.paths) == 2


def n_cached_pages(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        n_pages = -(-len(mapped) // mmap.PAGESIZE)
        resident = (ctypes.c_ubyte * n_pages)()
        first = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), resident
        )
        del first
        assert not failed
        return sum(page & 1 for page in resident)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in its page cache")
@pytest.mark.parametrize("flag", [0x80, 0], ids=["with the kernel's flag", "without"])
def test_a_cold_header_leaves_nothing_in_the_page_cache(
    tmp_path: Path, flag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursor, "_RWF_DONTCACHE", flag)
    path = tiny_model(tmp_path / "a.gguf", "llama", n_vocab=40_000)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if n_cached_pages(path):
        pytest.skip("this file system keeps its files in memory")
    assert open_model(path).header_bytes > 2 * cursor.WINDOW_BYTES
    assert n_cached_pages(path) == 0


class TestSplitFiles:
    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        return write_split_gguf(tmp_path / "m.gguf", META, TENSORS, 3)

    def test_parts_make_one_model(self, parts: list[Path], tmp_path: Path) -> None:
        model = open_model(parts[0])
        whole = open_model(write_gguf(tmp_path / "whole.gguf", META, TENSORS))
        assert [path.name for path in parts] == [f"m-0000{k}-of-00003.gguf" for k in (1, 2, 3)]
        assert model.paths == tuple(parts)
        assert list(model.tensors) == list(whole.tensors)
        for index, tensor in enumerate(TENSORS):
            info = model.tensors[tensor.name]
            assert info.file == index
            assert parts[index].read_bytes()[info.offset : info.offset + info.n_bytes] == tensor.data
        assert model.fingerprint != whole.fingerprint

    def test_a_first_part_without_tensors(self, tmp_path: Path) -> None:
        split = {"split.count": np.uint16(2), "split.tensors.count": np.int32(3)}
        first = tmp_path / "m-00001-of-00002.gguf"
        write_gguf(first, {**META, **split, "split.no": np.uint16(0)}, [])
        write_gguf(tmp_path / "m-00002-of-00002.gguf", {**split, "split.no": np.uint16(1)}, TENSORS)
        assert {info.file for info in open_model(first).tensors.values()} == {1}

    def test_a_later_part_names_the_first(self, parts: list[Path]) -> None:
        with pytest.raises(NotFirstPart, match=r"part 2 of 3; open .*m-00001-of-00003\.gguf"):
            open_model(parts[1])

    def test_missing_parts_are_named(self, parts: list[Path]) -> None:
        parts[1].unlink()
        parts[2].unlink()
        with pytest.raises(MissingPart, match=r"2 of 3 parts are missing: m-00002-of-00003\.gguf, m-00003"):
            open_model(parts[0])

    def test_a_part_twice(self, parts: list[Path]) -> None:
        shutil.copy(parts[1], parts[2])
        with pytest.raises(DuplicatePart, match="name says part 3, the header part 2"):
            open_model(parts[0])

    def test_parts_in_the_wrong_order(self, parts: list[Path]) -> None:
        shutil.copy(parts[2], parts[1])
        with pytest.raises(MismatchedPart, match="name says part 2, the header part 3"):
            open_model(parts[0])

    def test_a_later_part_renamed_to_the_first(self, parts: list[Path]) -> None:
        shutil.copy(parts[1], parts[0])
        with pytest.raises(MismatchedPart, match="name says part 1, the header part 2"):
            open_model(parts[0])

    def test_a_part_without_its_name(self, parts: list[Path]) -> None:
        renamed = parts[0].rename(parts[0].with_name("model.gguf"))
        with pytest.raises(MismatchedPart, match="one of 3 parts"):
            open_model(renamed)

    def test_another_number_of_parts(self, parts: list[Path], tmp_path: Path) -> None:
        other = write_split_gguf(tmp_path / "n.gguf", META, TENSORS, 2)
        shutil.copy(other[1], parts[1])
        with pytest.raises(MismatchedPart, match="the model has 2 parts, part 1 says 3"):
            open_model(parts[0])

    def test_a_name_with_another_number_of_parts(self, parts: list[Path]) -> None:
        renamed = parts[0].rename(parts[0].with_name("m-00001-of-00004.gguf"))
        with pytest.raises(MismatchedPart, match="has 3 parts, the name says 4"):
            open_model(renamed)

    def test_a_part_of_another_architecture(self, parts: list[Path]) -> None:
        split = {"split.count": 3, "split.no": 1, "split.tensors.count": 3}
        write_gguf(parts[1], {"general.architecture": "gemma3", **split}, TENSORS[1:2])
        with pytest.raises(MismatchedPart, match="'gemma3' model, part 1 of a 'llama'"):
            open_model(parts[0])

    def test_a_part_of_another_model(self, parts: list[Path], tmp_path: Path) -> None:
        other = write_split_gguf(tmp_path / "n.gguf", META, [*TENSORS, TENSORS[0]._replace(name="d")], 3)
        shutil.copy(other[1], parts[1])
        with pytest.raises(MismatchedPart, match=r"split\.tensors\.count differs"):
            open_model(parts[0])

    def test_a_part_without_split_keys(self, parts: list[Path]) -> None:
        write_gguf(parts[1], {}, TENSORS[1:2])
        with pytest.raises(MismatchedPart, match=r"lacks split\.count"):
            open_model(parts[0])

    def test_a_tensor_in_two_parts(self, parts: list[Path]) -> None:
        write_gguf(parts[1], {"split.count": 3, "split.no": 1, "split.tensors.count": 3}, TENSORS[:1])
        with pytest.raises(DuplicatePart, match=r"'a' is also in m-00001-of-00003\.gguf"):
            open_model(parts[0])

    def test_a_tensor_in_no_part(self, parts: list[Path]) -> None:
        write_gguf(parts[1], {"split.count": 3, "split.no": 1, "split.tensors.count": 3}, [])
        with pytest.raises(MismatchedPart, match="promise 3 tensors and hold 2"):
            open_model(parts[0])


@pytest.fixture(params=MODELS)
def real_path(request: pytest.FixtureRequest) -> Path:
    folder = os.environ.get("EDGELM_TEST_MODELS")
    path = Path(folder or "/nowhere", request.param)
    if not path.exists():
        pytest.skip(f"{request.param} is not in the folder that EDGELM_TEST_MODELS names")
    return path


@pytest.mark.models
def test_a_real_header_is_read_quickly(real_path: Path) -> None:
    open_model(real_path)
    times = []
    for _ in range(3):
        gc.collect()
        started = time.perf_counter()
        open_model(real_path)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


@pytest.mark.models
@pytest.mark.slow
def test_real_models_agree_with_gguf(real_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    theirs, ours = gguf.GGUFReader(real_path), open_model(real_path)
    keys = [key for key in theirs.fields if not key.startswith("GGUF.")]
    assert keys == list(ours.metadata)
    for key in keys:
        expected, value = theirs.fields[key].contents(), ours.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value if np.isscalar(value) else list(value)) == (
            expected
        ), key
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.type, info.shape, info.offset, info.n_bytes) == (
            tensor.tensor_type,
            tuple(tensor.shape.tolist()),
            tensor.data_offset,
            tensor.n_bytes,
        )
