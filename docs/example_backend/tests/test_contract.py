"""The example keeps the contract that edgelm's own backends keep, with bounds a thousand times narrower."""

import pytest

from edgelm.testing.backend_contract import BackendContract
from edgelm_einsum import BACKEND


class TestEinsumBackend(BackendContract):
    encodes = False

    product_nmse = 1e-9
    row_nmse = 1e-9

    @pytest.fixture
    def backend(self):
        return BACKEND
