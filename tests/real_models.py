"""The catalogue's models that this machine has, looked for before any test changes the environment."""

from __future__ import annotations

import os
from pathlib import Path

from edgelm_models.cache import find
from edgelm_models.catalogue import CATALOGUE


def _real_models() -> dict[str, Path]:
    folder = os.environ.get("EDGELM_TEST_MODELS")
    found = {name: Path(folder, entry.file_name).absolute() for name, entry in CATALOGUE.items()} if folder else {}
    pulled = {name: model.path for name in CATALOGUE if (model := find(name)) is not None}
    return pulled | {name: path for name, path in found.items() if path.is_file()}


REAL_MODELS = _real_models()
