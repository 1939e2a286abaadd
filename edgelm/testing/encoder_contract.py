"""The part of a backend's contract that models which embed texts need: `BackendContract` inherits it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgelm.engine.backend import Backend, Session, layout_of
from edgelm.engine.ir import Activation, EncodeSpec
from edgelm.errors import UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm.testing import reference
from edgelm.testing.recording import Recording
from edgelm.testing.reference import nmse

N_TOKENS = (1, 2, 7, 33)
ENCODE = EncodeSpec(n_heads=6, n_kv_heads=2, head_dim_k=32, head_dim_v=64, scale=0.18)


class EncoderContract:
    """Operations of encoders. The fixtures `backend` and `session` are those of `BackendContract`."""

    row_nmse = 1e-6
    """Bound for everything but products."""
    encodes = True
    """Whether the backend computes models that embed texts; else it must refuse their attention by name."""

    @staticmethod
    def record(backend: Backend, n_tokens: int, **options: Any) -> Recording:
        """Return a `Recording` whose weights and caches lie as the backend wants them. A session must be open."""
        return Recording(n_tokens, layout=layout_of(backend), cache=backend.capabilities().cache, **options)

    @pytest.mark.parametrize("n", N_TOKENS)
    @pytest.mark.parametrize(
        "spec",
        [ENCODE, ENCODE._replace(n_kv_heads=6), ENCODE._replace(window=9), ENCODE._replace(window=1)],
        ids=["sharing", "no sharing", "window", "alone"],
    )
    def test_encode(self, backend: Backend, session: Session, n: int, spec: EncodeSpec) -> None:
        recording = self.record(backend, n)
        q, k, v = (recording.value(heads * dim) for heads, dim in reference.attend_widths(spec))
        output = recording.ops.encode(q, k, v, spec)
        if not self.encodes:
            with pytest.raises(UnsupportedModel, match="encode"):
                recording.run(session, [output])
            return
        (ours,) = recording.run(session, [output])
        exact = reference.encode(recording.exact(q), recording.exact(k), recording.exact(v), spec)
        assert nmse(ours, exact) <= self.row_nmse

    @pytest.mark.parametrize("n", N_TOKENS)
    def test_rows_of_an_encoder(self, backend: Backend, session: Session, n: int) -> None:
        if not self.encodes:
            pytest.skip("the backend refuses models that embed texts")
        recording = self.record(backend, n)
        ops, x, wide = recording.ops, recording.value(96), recording.value(96, spread=20.0)
        scale, bias = recording.matrix(96, 1), recording.matrix(96, 1)
        exact_x, exact_scale, exact_bias = recording.exact(x), *map(recording.exact_weight, (scale, bias))
        (ours,) = recording.run(session, [ops.layer_norm(x, scale, bias, 1e-5)])
        assert nmse(ours, reference.layer_norm(exact_x, exact_scale, exact_bias, 1e-5)) <= self.row_nmse
        activations: tuple[Activation, ...] = ("silu", "gelu")
        for activation in activations:
            (ours,) = recording.run(session, [ops.activate(wide, activation)])
            exact = reference.gate(recording.exact(wide), np.ones(1), activation)
            assert nmse(ours, exact) <= max(self.row_nmse, 1e-5 if activation == "gelu" else 0)

    @pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16], ids=lambda kind: kind.name)
    def test_small_tables(self, backend: Backend, session: Session, kind: TensorType) -> None:
        if not self.encodes:
            pytest.skip("the backend refuses models that embed texts")
        recording = self.record(backend, 7, first_position=2)
        x, table = recording.value(96), recording.matrix(96, 12, kind)
        wanted = [recording.ops.add_row(x, table), recording.ops.add_positions(x, table)]
        first, positions = recording.run(session, wanted)
        exact, rows = recording.exact(x), recording.exact_weight(table)
        assert nmse(first, exact + rows[0]) <= self.row_nmse
        assert nmse(positions, exact + rows[2:9]) <= self.row_nmse
