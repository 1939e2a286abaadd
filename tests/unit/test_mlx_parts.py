"""The MLX backend: its weight layout is exact, adopted weights are its own, a missing library is a sentence."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings
from edgelm.engine.health import check
from edgelm.engine.ir import Weight
from edgelm.engine.preparing import packed_bytes
from edgelm.engine.registry import get_backend
from edgelm.errors import BackendUnavailable, UnsupportedModel
from edgelm.files.blocks import QUANTIZED, take_apart
from edgelm.files.ggml_types import AFFINE_TYPES, TensorType, row_bytes
from edgelm.files.model import TensorInfo
from edgelm.testing.blocks import RANDOM_TYPES, random_weights
from edgelm.testing.recording import Recording
from edgelm_mlx import BACKEND, runtime
from edgelm_mlx.forms import FORMS, HALF, held_row_bytes, runs
from edgelm_mlx.layout import MlxLayout, pack_bits
from edgelm_mlx.session import MlxSession

WIDTH, ROWS = 512, 40


@pytest.fixture
def mx() -> Any:
    found = check("mlx")
    if not found.available:
        pytest.skip(f"mlx is not available here: {found.reason}")
    return import_module("mlx.core")


@pytest.fixture
def session(mx: Any) -> Iterator[MlxSession]:
    session = BACKEND.open(1)
    yield session
    session.close()


def unpack_bits(data: NDArray[np.uint8], n_bits: int) -> NDArray[np.int64]:
    """Return quants [rows, width] of a stream of bits, the lowest first."""
    bits = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, n_bits)
    return bits @ (1 << np.arange(n_bits))


def test_every_type_that_can_be_taken_apart_has_a_form() -> None:
    assert set(FORMS) == set(QUANTIZED) | AFFINE_TYPES


@pytest.mark.parametrize("kind", sorted(set(FORMS) & RANDOM_TYPES), ids=lambda kind: kind.name)
def test_the_layout_is_exact(kind: TensorType) -> None:
    """In exact arithmetic the packed weights are those of the file, to the last bit."""
    data = np.frombuffer(random_weights(kind, WIDTH * ROWS, 1.0, np.random.default_rng(0)), np.uint8)
    info = TensorInfo("w", kind, (WIDTH, ROWS), 0, 0, data.size)
    packed = packed_bytes(MlxLayout(), info, data.tobytes())
    rows = np.frombuffer(packed, np.uint8).reshape(ROWS, held_row_bytes(kind, WIDTH))
    words, *numbers = (rows[:, run.at : run.stop] for run in runs(kind, WIDTH))
    quants = unpack_bits(words, FORMS[kind].bits).reshape(ROWS, -1, 32)
    dtype = np.float16 if FORMS[kind].scales is TensorType.F16 else np.float32
    exact = [np.ascontiguousarray(part).view(dtype).astype(np.float64)[..., None] for part in numbers]
    weights = exact[0] * quants + exact[1]
    if FORMS[kind].halves:
        weights += (exact[2] * quants + exact[3]) * np.where(np.arange(32) < HALF, 1, -1)
    parts = take_apart(kind, data.reshape(ROWS, -1))
    expected = parts.codes.reshape(*parts.scales.shape, -1) * parts.scales[..., None].astype(np.float64)
    if parts.offsets is not None:
        expected += parts.offsets[..., None]
    assert np.array_equal(weights.reshape(ROWS, -1), expected.reshape(ROWS, -1))


@pytest.mark.parametrize("n_bits", [2, 3, 4, 5, 6, 8])
def test_quants_are_packed_as_mlx_packs_them(mx: Any, n_bits: int) -> None:
    weights = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    words, _, _ = mx.quantize(mx.array(weights), group_size=32, bits=n_bits)
    theirs = np.array(words).view(np.uint8)
    quants = unpack_bits(theirs, n_bits)
    assert len(np.unique(quants)) > 3
    assert np.array_equal(pack_bits(quants.astype(np.uint8), n_bits), theirs)


def test_scales_beyond_float16_are_refused() -> None:
    """A zero of 128 times a scale of 1,000 is more than float16 holds."""
    block = np.concatenate([np.array([1000.0], np.float16).view(np.uint8), np.ones(32, np.uint8)])
    data = np.tile(block, 2)
    info = TensorInfo("blk.0.w", TensorType.Q8_0, (32, 2), 0, 0, data.size)
    with pytest.raises(UnsupportedModel, match=r"blk\.0\.w.*another backend"):
        packed_bytes(MlxLayout(), info, data.tobytes())


def test_floats_vectors_and_what_mlx_quantized_stay_as_they_are() -> None:
    layout = MlxLayout()
    n_bytes = row_bytes(TensorType.AFFINE4_G64_BF16, 128) * 8
    assert layout.packed(TensorInfo("w", TensorType.AFFINE4_G64_BF16, (128, 8), 0, 0, n_bytes)) is None
    assert layout.packed(TensorInfo("w", TensorType.F16, (64, 8), 0, 0, 64 * 8 * 2)) is None
    assert layout.packed(TensorInfo("b", TensorType.Q8_0, (64, 1), 0, 0, row_bytes(TensorType.Q8_0, 64))) is None


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.BF16, TensorType.Q4_K, TensorType.Q6_K, TensorType.Q8_0])
def test_adopted_weights_give_the_same_bits(mx: Any, session: MlxSession, kind: TensorType) -> None:
    recording = Recording(3, layout=MlxLayout())
    x, matrix, bias = recording.value(256), recording.matrix(256, 96, kind), recording.matrix(96, 1)
    output = recording.ops.linear(x, matrix, bias)
    segment, shape = recording.segment([output])
    program = session.compile(segment, shape)
    handles: list[int] = []

    class Adopting:
        """A program that adopts what it is bound to, and then spoils it."""

        def run(self, bindings: Bindings) -> None:
            if not handles:
                handles.extend(
                    session.adopt(weight, address, i == 0)
                    for i, (weight, address) in enumerate(zip(segment.weights, bindings.weights, strict=True))
                )
                recording.relocate_weights()
            bindings = bindings._replace(weights=tuple(handles))
            program.run(bindings)

    (expected,) = recording.run(session, [output])
    expected = expected.copy()
    before = mx.get_active_memory()
    session_compile, session.compile = session.compile, lambda *_: Adopting()  # type: ignore[method-assign,assignment,return-value]
    (ours,) = recording.run(session, [output])
    session.compile = session_compile  # type: ignore[method-assign]
    assert all(handle < 0 for handle in handles)
    assert np.array_equal(ours, expected)
    assert mx.get_active_memory() - before == 96 * held_row_bytes(kind, 256) + 4 * 96
    for handle in handles:
        session.drop(handle)
    assert mx.get_active_memory() == before


def test_threads_do_not_add_up(session: MlxSession) -> None:
    """MLX starts a thread for every stream, and by itself a stream for every thread that computes."""
    recording = Recording(1)
    program = recording.program(session, [recording.ops.linear(recording.value(64), recording.matrix(64, 64))])
    program()
    n_before = n_threads()
    for _ in range(12):
        thread = threading.Thread(target=program)
        thread.start()
        thread.join()
    assert n_threads() <= n_before + 2  # a thread that was joined may linger for a moment


def n_threads() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return int(next(line for line in file if line.startswith("Threads:")).split()[1])
    except OSError:
        pytest.skip("this system does not tell a process's threads")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (False, r"MLX is not installed.*pip install 'edgelm\[mlx\]'"),
        (True, r"does not load .*libmlx\.so.*pip install 'mlx\[cpu\]'"),
    ],
    ids=["missing", "a shell without libmlx"],
)
def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch, installed: bool, message: str) -> None:
    def fail(name: str) -> None:
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(runtime, "import_module", fail)
    monkeypatch.setattr(runtime, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(BackendUnavailable, match=message):
        runtime.load.__wrapped__()
    monkeypatch.setattr(runtime, "load", runtime.load.__wrapped__)
    assert re.search(message, BACKEND.probe().reason)


def test_an_old_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        __version__ = "0.20.0"

    monkeypatch.setattr(runtime, "import_module", lambda name: Old)
    with pytest.raises(BackendUnavailable, match=r"0\.20\.0 is too old"):
        runtime.load.__wrapped__()


def test_probe_names_version_and_device(mx: Any) -> None:
    assert get_backend("mlx").probe().version.startswith(f"MLX {mx.__version__} on the ")
    assert BACKEND.identity()


def test_a_closed_session_keeps_nothing(mx: Any) -> None:
    session = BACKEND.open(1)
    before = mx.get_active_memory()
    data = np.ones(64 * 64, np.float32)
    session.adopt(Weight("", TensorType.F32, 64, 64), data.ctypes.data, True)
    assert mx.get_active_memory() > before
    session.close()
    assert mx.get_active_memory() == before
    assert mx.get_cache_memory() == 0
