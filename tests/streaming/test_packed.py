"""A packed model streams the bits of its GGUF file, and never computes with a bit that has flipped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from engines import BACKENDS, budgets, engine_at, need, shrink, some_by_default
from numpy.typing import NDArray

import edgelm
from edgelm.engine import loading
from edgelm.engine.forward import Engine
from edgelm.engine.registry import get_backend
from edgelm.files import DamagedPack, DamagedWeights, pack
from edgelm.files.index import open_indexed
from edgelm.memory import pinned, stores
from edgelm.memory.buffer import PAGE, Buffer
from edgelm.memory.stores import MemoryStore, Store, span
from edgelm.memory.verified import VerifiedStore, verified
from edgelm.sizes import GB
from edgelm.testing import ARCHITECTURES, tiny_model

N_VOCAB = 384
IDS = np.random.default_rng(7).integers(3, 250, 48).tolist()
N_PROMPT = 40


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots, checksums and pieces of loading small enough for tiny models to have many of each."""
    shrink(monkeypatch)
    monkeypatch.setattr(pack, "TILE_BYTES", 2 * PAGE)
    monkeypatch.setattr(pinned, "LOAD_BYTES", 20_000)


def walk(engine: Engine) -> NDArray[np.float32]:
    rows = [engine.forward(IDS[:N_PROMPT])[-1].copy()]
    rows += [engine.forward([token])[-1].copy() for token in IDS[N_PROMPT:]]
    return np.stack(rows)


@contextmanager
def packed_at(path: Path, budget_bytes: int, backend: str = "numpy", content: bytes = b"") -> Iterator[Engine]:
    """Open an engine as `load` does, verified, at an exact budget; `content` stands in for the file's."""
    file, session = open_indexed(path), get_backend(backend).open(1)
    try:
        prepared = loading.prepare(
            file, get_backend(backend), session, loading.Request(budget_bytes, 64, 1, 1), 0, None
        )
        engine = loading.build(prepared, verified(MemoryStore([content or path.read_bytes()]), file))
    except BaseException:
        session.close()
        raise
    try:
        yield engine
    finally:
        engine.close()


def floor(path: Path, backend: str = "numpy") -> int:
    """Return the smallest budget: another for a pack, whose vectors are padded and whose slots hold whole tiles."""
    with pytest.raises(edgelm.BudgetTooSmall) as caught, packed_at(path, 1, backend):
        pass
    return caught.value.needed_bytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", some_by_default(ARCHITECTURES))
def test_the_logits_of_a_pack_are_those_of_the_file(architecture: str, backend: str, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", architecture, n_vocab=N_VOCAB)
    packed = edgelm.pack(path).path
    assert any(0 < info.row_step < info.n_rows for info in open_indexed(packed).tensors.values())
    with engine_at(path, GB, backend=need(backend)) as engine:
        expected = walk(engine)
    least = max(floor(path, backend), floor(packed, backend))
    most = budgets(packed, 2, backend)[1]
    streamed = []
    for budget in range(least, most + 1, (most - least) // 2):
        for each in (path, packed):
            with packed_at(each, budget, backend) as engine:
                streamed.append(engine.plan.streamed_bytes)
                assert np.array_equal(walk(engine), expected)
    assert min(streamed[:2]) > 0


def flipped(content: bytes, at: int) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 0x10
    return bytes(changed)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_flipped_bit_anywhere_is_an_error_that_names_the_rows(share: float, tmp_path: Path) -> None:
    """At the first, at some middle and at the last byte of every tensor, streamed or pinned."""
    path = edgelm.pack(tiny_model(tmp_path / "tiny.gguf", "phi3", n_vocab=N_VOCAB, n_layers=2)).path
    content, file = path.read_bytes(), open_indexed(path)
    least, most = floor(path), GB
    looked_up = 0
    for info in file.tensors.values():
        at = int(share * (info.n_bytes - 1))
        row = at // info.row_bytes
        first = row // info.row_step * info.row_step
        last = min(first + info.row_step, info.n_rows) - 1
        ids = IDS[:N_PROMPT]
        if info.name == "token_embd.weight":  # rows are checked when they are looked up
            ids = [row, *ids]
            looked_up += 1
        for budget in (least, most):
            with (
                pytest.raises(
                    DamagedWeights, match=rf"rows {first} to {last} of tensor '{info.name}' .*; copy or pack"
                ),
                packed_at(path, budget, content=flipped(content, info.offset + at)) as engine,
            ):
                engine.forward(ids)
    assert looked_up == 1


def test_the_padding_between_tensors_is_nobodys(tmp_path: Path) -> None:
    path = edgelm.pack(tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=N_VOCAB)).path
    norm = open_indexed(path).tensors["output_norm.weight"]
    content = flipped(path.read_bytes(), norm.offset + norm.n_bytes + 5)
    with packed_at(path, budgets(path)[0], content=content) as engine:
        engine.forward(IDS)


class Glitch(MemoryStore):
    """Gives wrong bytes once, at the read of that number."""

    def __init__(self, files: list[bytes], number: int) -> None:
        super().__init__(files)
        self.number = number

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        first = super().read_into(file, offset, n_bytes, buffer, at)
        self.number -= 1
        if self.number == 0:
            buffer[first] ^= 1
        return first


@pytest.mark.parametrize("number", [1, 2, 40])
def test_what_was_read_wrong_once_is_read_again(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edgelm.pack(tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=N_VOCAB)).path
    budget = budgets(path)[0]
    with packed_at(path, budget) as engine:
        expected = walk(engine)
    glitches: list[Glitch] = []

    def glitchy(files: list[bytes]) -> Glitch:
        glitches.append(Glitch(files, number))
        return glitches[0]

    monkeypatch.setattr("test_packed.MemoryStore", glitchy)
    with packed_at(path, budget) as engine:
        assert np.array_equal(walk(engine), expected)
    assert glitches[0].number <= 0


def test_what_a_cache_gave_wrong_is_read_from_the_other_store(tmp_path: Path) -> None:
    path = edgelm.pack(tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=N_VOCAB)).path
    file, content = open_indexed(path), path.read_bytes()
    info = file.tensors["blk.1.ffn_up.weight"]
    bad: Store = MemoryStore([flipped(content, info.offset + 70)])
    with Buffer(span(info.offset, info.n_bytes)) as buffer:
        with pytest.raises(DamagedWeights):
            VerifiedStore(bad, file).read_into(0, info.offset, info.n_bytes, buffer.view, 0)
        store = VerifiedStore(bad, file, again=MemoryStore([content]))
        first = store.read_into(0, info.offset, info.n_bytes, buffer.view, 0)
        assert bytes(buffer.view[first : first + info.n_bytes]) == content[info.offset : info.offset + info.n_bytes]


def test_load_verifies_streamed_and_pinned_weights(tmp_path: Path) -> None:
    """The whole way of `edgelm.load`, with real reads."""
    path = edgelm.pack(tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=N_VOCAB)).path
    info = open_indexed(path).tensors["blk.1.ffn_down.weight"]
    content = path.read_bytes()
    with edgelm.load(path, memory="1GB", context=32, backend="numpy") as model:
        assert model.plan.streamed_bytes == 0
        assert model.generate("the end", max_tokens=2) is not None
    path.write_bytes(flipped(content, info.offset + info.n_bytes // 2))
    with pytest.raises(DamagedWeights, match=r"blk\.1\.ffn_down\.weight"):
        edgelm.load(path, memory="1GB", context=32, backend="numpy")
    with pytest.raises(DamagedPack):  # the class that callers outside need not tell apart
        edgelm.load(path, memory="1GB", context=32, backend="numpy")


def test_the_flash_is_measured_without_a_look_at_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_rates: None
) -> None:
    """Reads share memory then: what is compared with a checksum is perhaps another read's."""
    path = edgelm.pack(tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=N_VOCAB)).path
    read_into, n_reads = stores._FileStore.read_into, itertools.count()

    def overtaken(self: stores._FileStore, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        next(n_reads)
        first = read_into(self, file, offset, n_bytes, buffer, at)
        buffer[first : first + n_bytes] = bytes(n_bytes)
        return first

    with edgelm.load(path, memory=2 * GB, backend="numpy", threads=1, context=64) as model:
        monkeypatch.setattr(stores._FileStore, "read_into", overtaken)
        assert model.set_budget(GB).budget_bytes == GB
    assert next(n_reads) > 1
