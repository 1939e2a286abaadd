"""The NumPy backend keeps the contract of backends, with the bounds of float32 arithmetic."""

from __future__ import annotations

import pytest

from edgelm.engine.backend import Backend
from edgelm.testing.backend_contract import BackendContract
from edgelm_numpy import BACKEND


class TestNumpyBackend(BackendContract):
    product_nmse = 1e-9
    row_nmse = 1e-9

    @pytest.fixture
    def backend(self) -> Backend:
        return BACKEND


class TestNumpyBackendOnOneThread(TestNumpyBackend):
    n_threads = 1
