"""The simulated NPU keeps the contract of backends, with the bounds of 8-bit weights and activations."""

from __future__ import annotations

import pytest

from edgelm.engine.backend import Backend
from edgelm.testing.backend_contract import BackendContract
from edgelm_npu import BACKEND


class TestNpuBackend(BackendContract):
    row_nmse = 1e-9

    @pytest.fixture
    def backend(self) -> Backend:
        return BACKEND


class TestNpuBackendOnOneThread(TestNpuBackend):
    n_threads = 1
