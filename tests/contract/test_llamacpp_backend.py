"""The llama.cpp backend keeps the contract of backends, with the bounds of eight-bit activations."""

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
    found = check("llamacpp")
    return "" if found.available else found.reason


class TestLlamacppBackend(BackendContract):
    # ggml's float kernel for several tokens takes row counts divisible by 4 only; for others it falls back to
    # another order of summation, so a matrix of 293 rows differs from its tiles of 32. No model has such a matrix.
    tiled_rows = 292
    n_threads = 1  # its threads spin at barriers, and tests share their cores

    @pytest.fixture
    def backend(self) -> Backend:
        if reason := why_not():
            pytest.skip(f"llamacpp is not available here: {reason}")
        return get_backend("llamacpp")
