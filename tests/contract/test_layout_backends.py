"""The contract suite on backends with layouts of their own, which are NumPy behind the layouts of the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgelm.engine.backend import Backend, CacheLayout
from edgelm.testing.backend_contract import BackendContract

sys.path.append(str(Path(__file__).parents[1] / "streaming"))
import layout_backends


class _Contract(BackendContract):
    product_nmse = 1e-6

    @pytest.fixture
    def backend(self) -> Backend:
        return self.made

    made: Backend

    def test_scratch_promise_holds(self, backend: Backend) -> None:
        pytest.skip("these backends do not count what undoing their layouts takes")


@pytest.mark.slow
class TestShuffled(_Contract):
    made = layout_backends.SHUFFLED


@pytest.mark.slow
class TestOtherCache(_Contract):
    made = layout_backends.LayoutBackend("placed", cache=CacheLayout("f16", "place_dim", rings=False))


class TestAdopting(_Contract):
    made = layout_backends.ADOPTING
