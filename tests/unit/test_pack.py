"""A pack is the model it was made of, laid out anew, and is there whole or not at all."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

import edgelm
from edgelm import packing
from edgelm.cachedir import cache_dir
from edgelm.engine.architecture import record
from edgelm.engine.registry import get_architecture
from edgelm.errors import ConfigError, UnsupportedModel
from edgelm.files import DamagedPack, gguf, pack
from edgelm.files.gguf import open_model
from edgelm.files.index import open_indexed
from edgelm.files.model import ROW_STEP, ModelFile, TensorInfo
from edgelm.files.strings import StringArray
from edgelm.packing import PackError
from edgelm.testing import ARCHITECTURES, tiny_model
from edgelm.text import build, tables
from edgelm.text.tokenizer import load_tokenizer

MIXED = {"default": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "attn_v": "F16"}


def content(model: ModelFile, info: TensorInfo) -> bytes:
    with model.paths[info.file].open("rb") as file:
        file.seek(info.offset)
        return file.read(info.n_bytes)


def equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    return type(one) is type(other) and one == other


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama", types=MIXED)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_and_metadata_stay_what_they_are(architecture: str, tmp_path: Path) -> None:
    source = open_model(tiny_model(tmp_path / "tiny.gguf", architecture, types=MIXED))
    done = edgelm.pack(source.paths[0])
    assert done.path == tmp_path / "tiny.edgelm.gguf"
    packed = open_model(done.path)
    assert set(packed.tensors) == set(source.tensors)
    for name, info in source.tensors.items():
        there = packed.tensors[name]
        assert (there.type, there.shape) == (info.type, info.shape)
        assert content(packed, there) == content(source, info), name
        assert there.offset % 4096 == 0
    assert set(packed.metadata) - set(source.metadata) == {"general.alignment", pack.VERSION_KEY, pack.SOURCE_KEY}
    assert all(equal(value, packed.metadata[key]) for key, value in source.metadata.items())
    assert packed.metadata[pack.SOURCE_KEY] == "tiny.gguf"


def test_every_kind_of_metadata_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Also what Python would write another way: a whole number of 64 bits that 32 would hold, a double."""
    kinds = {f"t.{kind}": np.dtype(kind).type(1) for kind in ("u1", "i1", "u2", "i2", "i4", "u8", "i8", "f4", "f8")}
    more = {
        **kinds,
        "t.bool": True,
        "t.bools": [True, False],
        "t.doubles": np.array([0.1, np.inf]),
        "t.texts": ["", "é"],
    }
    source = tiny_model(tmp_path / "tiny.gguf", "llama", metadata=more)
    done = edgelm.pack(source)
    theirs, ours = gguf.read_part(source), gguf.read_part(done.path)
    for key, (start, end) in theirs.spans.items():
        first, last = ours.spans[key]
        assert done.path.read_bytes()[first:last] == source.read_bytes()[start:end], key


def test_tensors_lie_in_pass_order_with_vectors_together(tmp_path: Path) -> None:
    source = open_model(tiny_model(tmp_path / "tiny.gguf", "phi3"))
    order = [info.name for info in open_model(edgelm.pack(source.paths[0]).path).tensors.values()]
    n_vectors = sum(1 for info in source.tensors.values() if info.n_rows == 1)
    assert all(source.tensors[name].n_rows == 1 for name in order[:n_vectors])
    trace = record(get_architecture("phi3"), source, 64)
    used = dict.fromkeys(weight.tensor for weight in trace.weights())
    assert order[n_vectors:] == [name for name in used if source.tensors[name].n_rows > 1]
    assert order[n_vectors] == "token_embd.weight"
    assert order[-1] == "output.weight"


def test_it_opens_from_its_own_index_as_from_its_header(model: Path) -> None:
    done = edgelm.pack(model)
    plain, indexed = open_model(done.path), open_indexed(done.path)
    assert plain.pack is None
    assert indexed.pack is not None
    assert (indexed.fingerprint, indexed.architecture) == (plain.fingerprint, plain.architecture)
    assert (indexed.header_bytes, indexed.file_bytes) == (plain.header_bytes, plain.file_bytes)
    assert set(indexed.metadata) == set(plain.metadata)
    assert all(equal(indexed.metadata[key], plain.metadata[key]) for key in plain.metadata)
    for name, info in plain.tensors.items():
        there = indexed.tensors[name]
        assert (there.type, there.shape, there.offset, there.n_bytes) == (
            info.type, info.shape, info.offset, info.n_bytes,
        )  # fmt: skip
    assert list(indexed.tensors) == list(plain.tensors)
    assert done.size_bytes == done.path.stat().st_size
    assert done.n_checksums == sum(map(pack.n_tiles, indexed.tensors.values()))


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    whole = open_model(tiny_model(tmp_path / "whole.gguf", "qwen2"))
    first = tiny_model(tmp_path / "tiny.gguf", "qwen2", n_parts=3)
    done = edgelm.pack(first)
    assert done.path == tmp_path / "tiny.edgelm.gguf"
    packed = open_model(done.path)
    assert not any(key.startswith("split.") for key in packed.metadata)
    assert all(content(packed, packed.tensors[name]) == content(whole, info) for name, info in whole.tensors.items())


def test_other_readers_of_gguf_read_it(model: Path) -> None:
    reader = GGUFReader(edgelm.pack(model).path)
    source = open_model(model)
    assert {tensor.name for tensor in reader.tensors} == set(source.tensors)
    for tensor in reader.tensors:
        assert tensor.data.tobytes() == content(source, source.tensors[tensor.name])


def test_llama_cpp_reads_it_and_says_the_same(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tiny_model(tmp_path / "tiny.gguf", "qwen2", types="Q8_0")

    def answer(path: Path) -> list[int]:
        llm = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
        try:
            tokens = llm.generate(llm.tokenize(b"the end"), temp=0.0)
            return [next(tokens) for _ in range(12)]
        finally:
            llm.close()

    assert answer(edgelm.pack(model).path) == answer(model)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_it_starts_without_parsing_a_vocabulary_and_keeps_nothing(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tmp_path / "tiny.gguf", architecture)
    expected = load_tokenizer(open_model(model), cache_dir=tmp_path / "other").encode("the winter and the sea")
    path = edgelm.pack(model).path

    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a header was read, or tables were built")

    for module, name in ((gguf, "read_header"), (gguf, "open_model"), (build, "build_tables")):
        monkeypatch.setattr(module, name, refuse)
    file = open_indexed(path)
    assert load_tokenizer(file).encode("the winter and the sea") == expected
    trace = record(get_architecture(file.architecture), file, 64)
    assert trace.ops
    assert not cache_dir().exists()


def test_tables_of_another_format_are_built_anew_and_that_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "TABLES_FORMAT", tables.FORMAT + 1)
    path = edgelm.pack(model).path
    expected = load_tokenizer(open_model(model)).encode("the end")
    assert load_tokenizer(open_indexed(path)).encode("the end") == expected
    with edgelm.load(path, memory="1GB", context=32, backend="numpy") as loaded:
        assert any("pack the model again" in note for note in loaded.notes)
    monkeypatch.undo()
    with edgelm.load(edgelm.pack(model, force=True).path, memory="1GB", context=32, backend="numpy") as loaded:
        assert not any("pack the model again" in note for note in loaded.notes)


def test_without_the_hashing_library_it_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edgelm.pack(model).path
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(UnsupportedModel, match="pip install xxhash"):
        open_indexed(path)
    assert open_model(path).tensors


@given(st.integers(1, 200_000), st.integers(1, 2000).map(lambda n: 2 * n))
def test_tiles_are_whole_panels_of_rows_and_not_small(n_rows: int, row_bytes: int) -> None:
    rows = pack.tile_rows(n_rows, row_bytes)
    assert 1 <= rows <= n_rows
    if rows < n_rows:
        assert rows % ROW_STEP == 0
        assert pack.TILE_BYTES <= rows * row_bytes < 2 * pack.TILE_BYTES + ROW_STEP * row_bytes
    step = math.lcm(ROW_STEP, 4096 // math.gcd(4096, row_bytes))
    assert rows == n_rows or step * row_bytes > 2 * pack.TILE_BYTES or rows * row_bytes % 4096 == 0


# -- writing ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_what_is_no_file_is_never_replaced(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PackError, match="a device or a pipe"):
        edgelm.pack(model, tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_in_the_way_is_replaced_only_if_asked(model: Path, tmp_path: Path) -> None:
    there = tmp_path / "out.gguf"
    there.write_bytes(b"mine")
    with pytest.raises(PackError, match="exists; replace it with force"):
        edgelm.pack(model, there)
    assert there.read_bytes() == b"mine"
    assert edgelm.pack(model, there, force=True).path == there
    assert open_indexed(there).pack is not None


def test_a_folder_gets_a_file_with_the_usual_name(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packs"
    folder.mkdir()
    assert edgelm.pack(model, folder).path == folder / "tiny.edgelm.gguf"


def test_a_pack_is_not_packed_again(model: Path) -> None:
    done = edgelm.pack(model)
    with pytest.raises(ConfigError, match="a pack already"):
        edgelm.pack(done.path)


def test_a_full_disk_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = edgelm.pack(model).size_bytes
    monkeypatch.setattr(packing, "free_bytes", lambda folder: size - 1)
    folder = tmp_path / "full"
    folder.mkdir()
    with pytest.raises(PackError, match=r"needs .* and .* are free there; make room"):
        edgelm.pack(model, folder / "out.gguf")
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(packing, "free_bytes", lambda folder: size)
    assert edgelm.pack(model, folder / "out.gguf").size_bytes == size


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_goes_wrong_half_way_leaves_nothing(failure: BaseException, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()

    def fail(done: int, total: int) -> None:
        assert len(list(folder.iterdir())) == 1
        if 2 * done > total:
            raise failure

    expected = PackError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        edgelm.pack(model, folder / "out.gguf", progress=fail)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process at once")
def test_a_killed_pack_leaves_no_file_of_its_name_and_the_next_clears_up(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    script = (
        "import os, signal, sys, edgelm\n"
        "def die(done, total):\n    if 2 * done > total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "edgelm.pack(sys.argv[1], sys.argv[2], progress=die)"
    )
    child = subprocess.run([sys.executable, "-c", script, model, folder / "out.gguf"], check=False)
    assert child.returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    assert left.name == "out.gguf." + left.name.split(".")[2] + ".partial"
    edgelm.pack(model, folder / "out.gguf")
    assert [path.name for path in folder.iterdir()] == ["out.gguf"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(PackError, match="ermission denied"):
        edgelm.pack(model, folder / "out.gguf")


def test_a_folder_that_is_not_there(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"No such file or directory\); check the folder"):
        edgelm.pack(model, tmp_path / "nowhere" / "out.gguf")


def test_it_takes_little_memory(tmp_path: Path) -> None:
    """Three times the blocks of the copy, not the model."""
    model = tiny_model(tmp_path / "tiny.gguf", "llama", n_layers=6, n_embd=512, head_dim=128, n_ff=4096)
    assert model.stat().st_size > 150_000_000
    script = (
        "import sys, edgelm\nfrom edgelm.memory.meter import Meter\n"
        "edgelm.pack(sys.argv[1], sys.argv[3])\nbefore = Meter().sample().peak_bytes\n"
        "edgelm.pack(sys.argv[2], sys.argv[3], force=True)\nprint(Meter().sample().peak_bytes - before)"
    )
    small = tiny_model(tmp_path / "small.gguf", "llama", n_layers=6)
    argv = [sys.executable, "-c", script, small, model, tmp_path / "out.gguf"]
    grown = int(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    assert grown < 3 * packing._BLOCK_BYTES


def test_strings_that_are_not_text_survive(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "tiny.gguf", "llama", metadata={"t.raw": StringArray.of([b"\xff\xfe", b"ok"])})
    packed = open_model(edgelm.pack(source).path)
    assert packed.metadata["t.raw"].raw(0) == b"\xff\xfe"


def test_damage_names_the_pack(model: Path) -> None:
    path = edgelm.pack(model).path
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\0" * 8)
    with pytest.raises(DamagedPack, match=r"tiny\.edgelm\.gguf: the footer .*; copy or pack"):
        open_indexed(path)
    assert open_model(path).tensors
