"""What every backend promises of the types of keys and values that it claims. Part of `BackendContract`."""

from __future__ import annotations

import pytest

from edgelm.engine.backend import Backend, Session, layout_of
from edgelm.engine.ir import AttendSpec
from edgelm.memory.cache_layout import Item
from edgelm.testing import reference
from edgelm.testing.recording import Recording
from edgelm.testing.reference import nmse

ATTEND = AttendSpec(layer=0, n_heads=6, n_kv_heads=2, head_dim_k=32, head_dim_v=64, scale=0.18)
BLOCKS: tuple[tuple[Item, Item], ...] = (
    ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"), ("q8_0", "f16"), ("f16", "q8_0"),
)  # fmt: skip


class CacheContract:
    """Attention over quantized keys and values. The fixtures `backend` and `session` are those of `BackendContract`."""

    product_nmse = 5e-4
    """Bound for `linear` and `attend`: eight-bit activations are allowed."""

    @pytest.mark.parametrize("n", [1, 3, 70])
    @pytest.mark.parametrize("spec", [ATTEND, ATTEND._replace(softcap=3.0)], ids=["plain", "softcap"])
    @pytest.mark.parametrize("items", BLOCKS, ids=":".join)
    def test_attend_over_blocks(
        self, backend: Backend, session: Session, n: int, spec: AttendSpec, items: tuple[Item, Item]
    ) -> None:
        """Keys and values of the types that the backend claims are rounded once, and nothing else is."""
        can = backend.capabilities()
        if not can.kv.issuperset(items):
            pytest.skip(f"the backend does not claim keys and values as {' and '.join(items)}")
        layout = can.cache.of_types(*items)
        recording = Recording(n, layout=layout_of(backend), cache=layout, capacity=200, length=160)
        q, k, v = (recording.value(heads * dim) for heads, dim in reference.attend_widths(spec))
        output = recording.ops.attend(q, k, v, spec)
        for first in (0, n):
            recording.move_to(first)
            (ours,) = recording.run(session, [output])
            assert nmse(ours, recording.exact_attend(q, k, v, spec)) <= self.product_nmse
        for ours_cache, exact_cache in recording.caches(spec):
            assert nmse(ours_cache, exact_cache) <= self.product_nmse  # a number between two codes may go either way
