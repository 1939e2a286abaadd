"""The contract of a backend as tests: inherit `BackendContract`, override the fixture `backend`, run pytest.

Every operation is compared with a float64 reference written out in `edgelm.testing.reference`; then what makes
streaming exact is checked: equal bits however a matrix or a segment is cut and wherever the weights lie.
Segments are recorded with `Ops`, as architectures do. Errors are normalized mean squared errors (NMSE), as in
llama.cpp's test-backend-ops.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from edgelm.engine.backend import Adopting, Backend, Session, layout_of
from edgelm.engine.ir import Activation, AttendSpec, RopeSpec
from edgelm.engine.preparing import packed_bytes
from edgelm.errors import Cancelled, UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo
from edgelm.testing import reference
from edgelm.testing.blocks import RANDOM_TYPES, random_weights
from edgelm.testing.cache_contract import ATTEND, CacheContract
from edgelm.testing.encoder_contract import N_TOKENS, EncoderContract
from edgelm.testing.memory import peak_growth_bytes
from edgelm.testing.reference import nmse

TILED_TYPES = (TensorType.F32, TensorType.Q4_0, TensorType.Q8_0, TensorType.Q4_K, TensorType.Q6_K)
TREES = ((-1, -1, 0, 1, 2, 2, 4, 0), (-1,) * 5, (-1, 0, 0, 2), (-1, *(i // 2 for i in range(31))))
ROPE = RopeSpec(n_heads=3, n_dims=32, neox=True, base=10000.0)
YARN = ROPE._replace(base=500000.0, freq_scale=0.25, ext_factor=1.0, attn_factor=0.9, n_ctx_orig=64)


class BackendContract(CacheContract, EncoderContract):
    """Inherit this and override `backend`. The bounds below may be tightened, and `row_cut` set to 1."""

    row_cut = 32
    """Rows of a matrix are cut at multiples of this; the results must keep their bits."""
    tiled_rows = 293
    """Rows of the matrix that is cut: by default the last tile is odd."""
    n_threads = 2

    @pytest.fixture
    def backend(self) -> Backend:
        raise NotImplementedError("override the fixture `backend`")

    @pytest.fixture
    def session(self, backend: Backend) -> Iterator[Session]:
        session = backend.open(self.n_threads)
        yield session
        session.close()

    def test_probe_finds_the_backend(self, backend: Backend) -> None:
        availability = backend.probe()
        assert availability.available, availability.reason
        assert availability.version
        assert TensorType.F32 in backend.capabilities().types

    @pytest.mark.parametrize("kind", sorted(RANDOM_TYPES), ids=lambda kind: kind.name)
    @pytest.mark.parametrize("n", N_TOKENS)
    def test_linear(self, backend: Backend, session: Session, kind: TensorType, n: int) -> None:
        if kind not in backend.capabilities().types:
            pytest.skip(f"the backend does not claim {kind.name}")
        recording = self.record(backend, n)
        x = recording.value(512)
        matrix = recording.matrix(512, 70, kind)
        (ours,) = recording.run(session, [recording.ops.linear(x, matrix)])
        assert nmse(ours, recording.exact(x) @ recording.exact_weight(matrix).T) <= self.product_nmse

    def test_linear_with_bias_over_output_rows(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 5, out_rows=(4, 1))
        x = recording.value(96)
        matrix, bias = recording.matrix(96, 40), recording.matrix(40, 1)
        (ours,) = recording.run(session, [recording.ops.linear(recording.ops.select(x), matrix, bias)])
        expected = recording.exact(x)[[4, 1]] @ recording.exact_weight(matrix).T + recording.exact_weight(bias)
        assert nmse(ours, expected) <= self.product_nmse

    def test_unclaimed_type_is_refused(self, backend: Backend, session: Session) -> None:
        unclaimed = sorted(RANDOM_TYPES - backend.capabilities().types)
        if not unclaimed:
            pytest.skip("the backend claims every type that random weights exist for")
        recording = self.record(backend, 1)
        x = recording.value(256)
        with pytest.raises(UnsupportedModel, match=unclaimed[0].name):
            recording.run(session, [recording.ops.linear(x, recording.matrix(256, 32, unclaimed[0]))])

    @pytest.mark.parametrize("kind", sorted(RANDOM_TYPES), ids=lambda kind: kind.name)
    def test_embed(self, backend: Backend, session: Session, kind: TensorType) -> None:
        if kind not in backend.capabilities().types:
            pytest.skip(f"the backend does not claim {kind.name}")
        recording = self.record(backend, 7)
        table = recording.matrix(512, 7, kind)
        (ours,) = recording.run(session, [recording.ops.embed(table)])
        assert nmse(ours, recording.exact_weight(table)) <= self.row_nmse

    @pytest.mark.parametrize("n", N_TOKENS)
    @pytest.mark.parametrize(("groups", "scaled"), [(1, True), (1, False), (4, True), (4, False)])
    def test_rms_norm(self, backend: Backend, session: Session, n: int, groups: int, scaled: bool) -> None:
        recording = self.record(backend, n)
        x = recording.value(128)
        scale = recording.matrix(128 // groups, 1) if scaled else None
        (ours,) = recording.run(session, [recording.ops.rms_norm(x, scale, 1e-5, groups)])
        weight = recording.exact_weight(scale) if scale else np.ones(1)
        assert nmse(ours, reference.rms_norm(recording.exact(x), weight, 1e-5, groups)) <= self.row_nmse

    @pytest.mark.parametrize("n", N_TOKENS)
    def test_elementwise(self, backend: Backend, session: Session, n: int) -> None:
        recording = self.record(backend, n)
        ops, a, b = recording.ops, recording.value(96), recording.value(96, spread=30.0)
        wanted = [ops.add(a, b), ops.mul(a, b), ops.scale(a, -0.37), ops.softcap(b, 15.0), ops.slice(a, 32, 48)]
        exact_a, exact_b = recording.exact(a), recording.exact(b)
        expected = [exact_a + exact_b, exact_a * exact_b, exact_a * -0.37, 15 * np.tanh(exact_b / 15)]
        for ours, exact in zip(recording.run(session, wanted), [*expected, exact_a[:, 32:80]], strict=True):
            assert nmse(ours, exact) <= self.row_nmse

    @pytest.mark.parametrize("n", N_TOKENS)
    @pytest.mark.parametrize("activation", ["silu", "gelu"])
    def test_gate(self, backend: Backend, session: Session, n: int, activation: Activation) -> None:
        recording = self.record(backend, n)
        gate, up = recording.value(96, spread=20.0), recording.value(96)
        (ours,) = recording.run(session, [recording.ops.gate(gate, up, activation)])
        expected = reference.gate(recording.exact(gate), recording.exact(up), activation)
        assert nmse(ours, expected) <= max(self.row_nmse, 1e-5 if activation == "gelu" else 0)

    def test_gate_of_extreme_numbers_is_finite(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 1)
        gate, up = recording.value(64, spread=1e4), recording.value(64)
        for activation in ("silu", "gelu"):
            (ours,) = recording.run(session, [recording.ops.gate(gate, up, activation)])
            assert np.isfinite(ours).all()

    def test_select(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 7, out_rows=(6, 0, 3))
        x = recording.value(64)
        (ours,) = recording.run(session, [recording.ops.select(x)])
        assert np.array_equal(ours, recording.exact(x)[[6, 0, 3]])

    @pytest.mark.parametrize("n", N_TOKENS)
    @pytest.mark.parametrize(
        ("spec", "factors"),
        [
            (ROPE, False),
            (ROPE, True),
            (ROPE._replace(neox=False), False),
            (ROPE._replace(n_dims=16, freq_scale=0.125), False),
            (ROPE._replace(n_dims=16, neox=False), True),
            (YARN, False),
            (YARN._replace(neox=False, ext_factor=0.5), True),
        ],
    )
    def test_rope(self, backend: Backend, session: Session, n: int, spec: RopeSpec, factors: bool) -> None:
        recording = self.record(backend, n, first_position=300)
        x = recording.value(spec.n_heads * 32)
        weight = recording.matrix(spec.n_dims // 2, 1, mean=4.0) if factors else None
        (ours,) = recording.run(session, [recording.ops.rope(x, spec, weight)])
        divisors = recording.exact_weight(weight) if weight else np.ones(1)
        expected = reference.rope(recording.exact(x), recording.positions, spec, divisors)
        assert nmse(ours, expected) <= self.row_nmse

    @pytest.mark.parametrize("n", N_TOKENS)
    @pytest.mark.parametrize(
        "spec",
        [ATTEND, ATTEND._replace(softcap=3.0), ATTEND._replace(window=9), ATTEND._replace(n_kv_heads=6)],
        ids=["plain", "softcap", "window", "no sharing"],
    )
    def test_attend(self, backend: Backend, session: Session, n: int, spec: AttendSpec) -> None:
        """Two passes: the second reads what the first wrote. The cache has room that nobody may touch."""
        recording = self.record(backend, n, capacity=160, length=96)
        q, k, v = (recording.value(heads * dim) for heads, dim in reference.attend_widths(spec))
        output = recording.ops.attend(q, k, v, spec)
        for first in (0, n):
            recording.move_to(first)
            (ours,) = recording.run(session, [output])
            expected = recording.exact_attend(q, k, v, spec)
            assert nmse(ours, expected) <= self.product_nmse
        for ours_cache, exact_cache in recording.caches(spec):
            assert np.array_equal(ours_cache, exact_cache)

    def test_attend_writes_where_it_is_told(self, backend: Backend, session: Session) -> None:
        """A ring: places neither begin at 0 nor follow each other."""
        if not backend.capabilities().cache.rings:
            pytest.skip("the backend wants every position in its own place")
        recording = self.record(backend, 3, capacity=32, length=32, places=(31, 0, 7))
        q, k, v = (recording.value(heads * dim) for heads, dim in reference.attend_widths(ATTEND))
        (ours,) = recording.run(session, [recording.ops.attend(q, k, v, ATTEND)])
        assert nmse(ours, recording.exact_attend(q, k, v, ATTEND)) <= self.product_nmse
        for ours_cache, exact_cache in recording.caches(ATTEND):
            assert np.array_equal(ours_cache, exact_cache)

    @pytest.mark.parametrize("parents", TREES, ids=["branches", "siblings", "sparse", "wide"])
    @pytest.mark.parametrize(
        "spec", [ATTEND, ATTEND._replace(softcap=3.0), ATTEND._replace(window=9)], ids=["plain", "softcap", "window"]
    )
    def test_attend_in_a_tree(
        self, backend: Backend, session: Session, parents: tuple[int, ...], spec: AttendSpec
    ) -> None:
        """Rows of one pass that branch: each sees what is stored, its ancestors and itself, and no other branch."""
        n = len(parents)
        recording = self.record(backend, n, capacity=160, length=96, parents=parents, out_rows=range(n))
        q, k, v = (recording.value(heads * dim) for heads, dim in reference.attend_widths(spec))
        output = recording.ops.attend(q, k, v, spec)
        for first in (0, n, 2 * n):  # each is stored after the one before as a whole: masks decide who sees what
            recording.move_to(first)
            (ours,) = recording.run(session, [output])
            assert nmse(ours, recording.exact_attend(q, k, v, spec)) <= self.product_nmse
        for ours_cache, exact_cache in recording.caches(spec):
            assert np.array_equal(ours_cache, exact_cache)

    def test_a_branch_is_as_if_it_were_alone(self, backend: Backend, session: Session) -> None:
        """What lies on other branches, however large, changes no bit of a row."""
        found = []
        for spread in (1.0, 100.0):
            recording = self.record(backend, 4, capacity=64, length=64, parents=(-1, 0, -1, 2), out_rows=range(4))
            q, k, v = (recording.value(heads * dim) for heads, dim in reference.attend_widths(ATTEND))
            for tensor in (q, k, v):
                recording.inputs(tensor)[2:] *= spread
            found.append(recording.run(session, [recording.ops.attend(q, k, v, ATTEND)])[0][:2].copy())
        assert np.array_equal(found[0], found[1])

    @pytest.mark.parametrize("kind", TILED_TYPES, ids=lambda kind: kind.name)
    @pytest.mark.parametrize("n", [1, 2, 7, 32])
    def test_row_tiles_keep_every_bit(self, backend: Backend, session: Session, kind: TensorType, n: int) -> None:
        if kind not in backend.capabilities().types:
            pytest.skip(f"the backend does not claim {kind.name}")
        rows, rng = self.tiled_rows, np.random.default_rng(n)
        recording = self.record(backend, n)
        x = recording.value(256)
        matrix = recording.matrix(256, rows, kind)
        (whole,) = recording.run(session, [recording.ops.linear(x, matrix)])
        step = math.lcm(self.row_cut, recording.row_step(matrix))
        possible = np.arange(step, rows, step)
        for _ in range(6):
            cuts = [0, *sorted(rng.choice(possible, min(4, len(possible)), replace=False).tolist()), rows]
            parts = [
                recording.ops.linear(x, matrix._replace(first_row=start, rows=stop - start))
                for start, stop in pairwise(cuts)
            ]
            tiles = recording.run(session, parts)
            assert np.array_equal(np.concatenate(tiles, axis=1), whole), cuts

    def test_concat(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 3)
        parts = [recording.value(width) for width in (32, 96, 5)]
        (ours,) = recording.run(session, [recording.concat(parts)])
        assert np.array_equal(ours, np.concatenate([recording.exact(part) for part in parts], axis=1))

    @pytest.mark.parametrize("n", [1, 7])
    def test_cut_segments_keep_every_bit(self, backend: Backend, session: Session, n: int) -> None:
        """A block computed as one program, and as programs that hand values over in memory."""
        results = []
        for cuts in ((), (1,), (4, 9), (2, 3, 5, 8, 12), tuple(range(1, 14))):
            recording = self.record(backend, n, capacity=64, length=64)
            results.append(recording.run(session, [recording.block()], cuts=cuts)[0])
        for result in results[1:]:
            assert np.array_equal(result, results[0])

    def test_weights_may_lie_elsewhere_in_every_run(self, backend: Backend, session: Session) -> None:
        if not backend.capabilities().streams:
            pytest.skip("the backend does not stream")
        recording = self.record(backend, 2, capacity=64, length=64)
        output = recording.block()
        (first,) = recording.run(session, [output])
        program = recording.program(session, [output])
        for _ in range(3):
            recording.relocate_weights()
            (moved,) = program()
            assert np.array_equal(moved, first)

    @pytest.mark.parametrize("kind", TILED_TYPES, ids=lambda kind: kind.name)
    def test_adopted_weights_keep_every_bit(self, backend: Backend, session: Session, kind: TensorType) -> None:
        """Copies that a session keeps compute as the weights themselves do, which are gone; then those come again."""
        if not isinstance(session, Adopting):
            pytest.skip("the backend computes on the memory it is given")
        if kind not in backend.capabilities().types:
            pytest.skip(f"the backend does not claim {kind.name}")
        recording = self.record(backend, 3)
        x = recording.value(256)
        matrix, bias = recording.matrix(256, self.tiled_rows, kind), recording.matrix(self.tiled_rows, 1)
        scale = recording.matrix(256, 1)
        output = recording.ops.linear(recording.ops.rms_norm(x, scale, 1e-5), matrix, bias)
        (expected,) = recording.run(session, [output])
        for _ in range(2):
            with recording.adopted(session):
                (ours,) = recording.run(session, [output])
                assert np.array_equal(ours, expected)
        assert np.array_equal(recording.run(session, [output])[0], expected)

    def test_a_layout_has_the_same_bytes_every_time(self, backend: Backend, session: Session) -> None:
        """Tiles depend on nothing but their rows, so that a file that was prepared once serves for ever."""
        layout = layout_of(backend)
        if layout is None:
            pytest.skip("the backend computes on the bytes of the file")
        rng, n_packed = np.random.default_rng(3), 0
        for kind in sorted(RANDOM_TYPES & backend.capabilities().types):
            width, rows = 512, self.tiled_rows
            content = random_weights(kind, width * rows, width**-0.5, rng)
            info = TensorInfo("matrix", kind, (width, rows), 0, 0, len(content))
            packed = layout.packed(info)
            assert packed == layout.packed(info._replace(name="other", file=1, offset=4096)), "type and shape decide"
            if packed is None:
                continue
            n_packed += 1
            assert packed.row_bytes > 0
            assert packed.row_step > 0
            tile = memoryview(content)[: min(packed.row_step, rows) * info.row_bytes]
            made = [bytearray(len(tile) // info.row_bytes * packed.row_bytes) for _ in range(2)]
            layout.pack(info, 0, tile, memoryview(made[0]))
            whole = packed_bytes(layout, info, bytes(content))
            layout.pack(info, 0, tile, memoryview(made[1]))
            assert made[0] == made[1] == whole[: len(made[0])]
        assert n_packed, "a layout that packs nothing should be None"
        assert layout.key == layout_of(backend).key  # type: ignore[union-attr]

    def test_inputs_are_left_alone(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 2, capacity=64, length=64)
        output = recording.block()
        before = recording.input_bytes()
        recording.run(session, [output])
        assert recording.input_bytes() == before

    def test_abort_stops_programs_until_it_is_taken_back(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 2, capacity=64, length=64)
        program = recording.program(session, [recording.block()])
        (before,) = program()
        session.abort(True)
        with pytest.raises(Cancelled):
            program()
        session.abort(False)
        assert np.array_equal(program()[0], before)

    def test_abort_reaches_into_a_running_program(self, backend: Backend, session: Session) -> None:
        recording = self.record(backend, 33)
        x = recording.value(512)
        for _ in range(40):
            x = recording.ops.linear(x, recording.matrix(512, 512))
        program = recording.program(session, [x])
        stopped = threading.Event()

        def compute() -> None:
            try:
                while True:
                    program()
            except Cancelled:
                stopped.set()

        thread = threading.Thread(target=compute, daemon=True)
        thread.start()
        time.sleep(0.05)
        session.abort(True)
        assert stopped.wait(10)
        thread.join()

    def test_scratch_promise_holds(self, backend: Backend) -> None:
        """The peak of the process, above what it was, stays within the promise (and 2 MiB of small change)."""
        recording = self.record(backend, 256, capacity=512, length=512)
        output = recording.block(width=512, hidden=2048)
        session = backend.open(self.n_threads)
        try:
            small = self.record(backend, 256, capacity=512, length=512)
            small.run(session, [small.block()])  # libraries take what they take once
            segment, shape = recording.segment([output])
            promised = session.scratch_bytes(segment, shape)
            session.reserve(promised)
            program = recording.program(session, [output])
            grown = peak_growth_bytes(program)
            if grown is None:
                pytest.skip("this system does not tell a process's peak memory")
            assert promised > 0
            assert grown <= promised + (2 << 20)
        finally:
            session.close()
