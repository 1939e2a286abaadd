"""The MLX backend keeps the contract of backends, with the bounds of float32 arithmetic."""

from __future__ import annotations

from functools import cache

import pytest

from edgelm.engine.backend import Backend
from edgelm.engine.health import check
from edgelm.engine.registry import get_backend
from edgelm.testing.backend_contract import BackendContract


@cache
def why_not() -> str:
    """Return why the backend does not work here; tried in a child process, because its library may crash."""
    found = check("mlx")
    return "" if found.available else found.reason


class TestMlxBackend(BackendContract):
    encodes = False
    product_nmse = 1e-9
    row_nmse = 1e-9

    @pytest.fixture
    def backend(self) -> Backend:
        if reason := why_not():
            pytest.skip(f"mlx is not available here: {reason}")
        return get_backend("mlx")
