"""A tiny model, loaded without measuring the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from streams import load

from edgelm import Model
from edgelm.testing import tiny_model


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama")


@pytest.fixture(autouse=True)
def _measured_before(known_rates: None) -> None:
    """No test waits for the device to be measured."""


@pytest.fixture
def model(model_file: Path) -> Iterator[Model]:
    with load(model_file) as model:
        yield model
