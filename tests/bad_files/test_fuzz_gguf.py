"""No bytes may do anything but open or raise an EdgeLMError, in bounded time and memory."""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.errors import EdgeLMError
from edgelm.files import Meta, TensorType, open_model
from edgelm.testing import TensorData, write_gguf

MAX_S = 1.0
MAX_EXTRA_BYTES = 2_000_000  # of a file of a few kilobytes

settings.register_profile("files", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def seed_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of value."""
    metadata = {
        "general.architecture": "llama",
        "general.alignment": 64,
        "llama.block_count": 2,
        "llama.rope.freq_base": 1e4,
        "flag": True,
        "tokenizer.ggml.tokens": ["a", "", "long " * 60, "é"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
        "flags": [True, False],
        "head_count": [4, 2],
    }
    tensors = [
        TensorData("token_embd.weight", TensorType.Q4_0, (64, 4), bytes(144)),
        TensorData("output_norm.weight", TensorType.F32, (64,), bytes(256)),
        TensorData("experts", TensorType.F16, (4, 2, 2, 2), bytes(64)),
    ]
    return write_gguf(tmp_path_factory.mktemp("fuzz") / "seed.gguf", metadata, tensors).read_bytes()


def opens_or_raises(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    started = time.monotonic()
    tracemalloc.start()
    try:
        meta = Meta.of(open_model(path))
        meta.int("block_count", 1)
        meta.float("rope.freq_base", 1.0)
        meta.ints(".head_count", 2, 1)
    except EdgeLMError as error:
        assert "; " in str(error) or "needed" in str(error) or "not" in str(error)  # noqa: PT017
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.monotonic() - started < MAX_S
    assert peak < MAX_EXTRA_BYTES


@settings(settings.get_profile("files"), max_examples=150)
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(seed_file: bytes, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(seed_file)
    for at, value in changes:
        data[at % len(data)] = value
    opens_or_raises(bytes(data), tmp_path / "a.gguf")


@settings(settings.get_profile("files"), max_examples=120)
@given(
    at=st.integers(4, 2**16),
    value=st.sampled_from([0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
    width=st.sampled_from([4, 8]),
)
def test_hostile_numbers(seed_file: bytes, tmp_path: Path, at: int, value: int, width: int) -> None:
    at = 4 + at % (len(seed_file) - 12)
    number = (value % 2 ** (8 * width)).to_bytes(width, "little")
    opens_or_raises(seed_file[:at] + number + seed_file[at + width :], tmp_path / "a.gguf")


@settings(settings.get_profile("files"), max_examples=80)
@given(start=st.integers(4, 2**16), n_gone=st.integers(1, 64), extra=st.binary(max_size=24))
def test_bytes_gone_or_added(seed_file: bytes, tmp_path: Path, start: int, n_gone: int, extra: bytes) -> None:
    start = 4 + start % (len(seed_file) - 4)
    opens_or_raises(seed_file[:start] + extra + seed_file[start + n_gone :], tmp_path / "a.gguf")


@settings(settings.get_profile("files"), max_examples=50)
@given(tail=st.binary(max_size=400), magic=st.booleans())
def test_arbitrary_bytes(tmp_path: Path, tail: bytes, magic: bool) -> None:
    opens_or_raises((b"GGUF\x03\0\0\0" if magic else b"") + tail, tmp_path / "a.gguf")


def lying_file(path: Path, n_strings: int) -> Path:
    """A hundred megabytes of hole behind a header that promises `n_strings`: zeros are empty strings."""
    write_gguf(path, {"general.architecture": "llama", "k": ["x"] * 3}, [])
    data = bytearray(path.read_bytes())
    at = data.index((3).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"x")
    data[at : at + 8] = n_strings.to_bytes(8, "little")
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(100 * 2**20)
    return path


def test_a_large_file_that_lies_costs_no_memory(tmp_path: Path) -> None:
    path = lying_file(tmp_path / "a.gguf", 2**17)
    tracemalloc.start()
    try:
        model = open_model(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(model.metadata["k"]) == 2**17
    assert peak < 4 * 2**17 + 4 * 2**20, "four bytes per string, and the windows"


def test_the_largest_array_takes_seconds_at_most(tmp_path: Path) -> None:
    path = lying_file(tmp_path / "a.gguf", 2**22)
    started = time.monotonic()
    assert len(open_model(path).metadata["k"]) == 2**22
    assert time.monotonic() - started < 10
