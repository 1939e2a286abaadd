"""The ONNX Runtime backend keeps the contract of backends, with the bounds of eight-bit activations."""

from __future__ import annotations

from functools import cache

import pytest

from edgelm.engine.backend import Backend
from edgelm.engine.health import check
from edgelm.engine.registry import get_backend
from edgelm.memory.platform.allocator import tune_allocator
from edgelm.testing.backend_contract import BackendContract


@cache
def why_not() -> str:
    """Return why the backend does not work here; tried in a child process, because its library may crash."""
    found = check("onnx")
    return "" if found.available else found.reason


class TestOnnxBackend(BackendContract):
    encodes = False

    @pytest.fixture
    def backend(self) -> Backend:
        if reason := why_not():
            pytest.skip(f"onnx is not available here: {reason}")
        tune_allocator()  # as opening a model does: what is freed goes back to the system
        return get_backend("onnx")
