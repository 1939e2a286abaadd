"""The simulated NPU keeps the contract of backends, with the bounds of 8-bit weights and activations."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edgelm.engine.backend import Backend
from edgelm.errors import EdgeLMError
from edgelm.testing.backend_contract import BackendContract
from edgelm_npu import BACKEND, providers


class TestNpuBackend(BackendContract):
    encodes = False
    row_nmse = 1e-9

    @pytest.fixture
    def backend(self) -> Backend:
        return BACKEND


class TestProductsThatAProviderComputes(TestNpuBackend):
    """The way to real devices, with ONNX Runtime's own provider in the place of a device's."""

    provider = "CPUExecutionProvider"

    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> Backend:
        runtime = pytest.importorskip("onnxruntime", exc_type=ImportError)
        pytest.importorskip("onnx", exc_type=ImportError)
        if self.provider not in runtime.get_available_providers():
            pytest.skip(f"this ONNX Runtime has no {self.provider}")
        monkeypatch.setenv(providers.VARIABLE, self.device(monkeypatch))
        return BACKEND

    def device(self, monkeypatch: pytest.MonkeyPatch) -> str:
        stand_in = providers.PROVIDERS["openvino"]._replace(
            name="cpu", execution_provider=self.provider, options={}, falls_back=True
        )
        monkeypatch.setattr(providers, "PROVIDERS", {"cpu": stand_in})
        return "cpu"

    def test_it_is_a_device_and_says_so(self, backend: Backend) -> None:
        assert not backend.capabilities().simulated
        assert not backend.capabilities().streams
        assert "simulated" not in backend.probe().version

    def test_its_products_are_those_of_the_simulated_one(
        self, backend: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the simulated device computes is what a provider makes of 8-bit products, to the last bit of a float."""
        found = []
        for name in (os.environ[providers.VARIABLE], "simulated"):
            monkeypatch.setenv(providers.VARIABLE, name)
            session = backend.open(1)
            recording = self.record(backend, 33)
            x = recording.value(512)
            found += recording.run(session, [recording.ops.linear(x, recording.matrix(512, 75))])
            session.close()
        assert np.allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # and skipped where OpenVINO's ONNX Runtime is not
class TestProductsOnOpenVino(TestProductsThatAProviderComputes):
    provider = "OpenVINOExecutionProvider"

    def device(self, monkeypatch: pytest.MonkeyPatch) -> str:
        return "openvino:CPU"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("coreml", "has no CoreMLExecutionProvider"),
        ("tpu", "EDGELM_NPU='tpu' is not a provider (known: simulated, openvino, qnn, coreml, vitisai)"),
    ],
)
def test_a_device_that_is_not_here_is_a_sentence(monkeypatch: pytest.MonkeyPatch, wanted: str, said: str) -> None:
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    monkeypatch.setenv(providers.VARIABLE, wanted)
    found = BACKEND.probe()
    assert not found.available
    assert said in found.reason
    with pytest.raises(EdgeLMError):
        BACKEND.open(1)
