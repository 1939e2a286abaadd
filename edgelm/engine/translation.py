"""What an architecture says of a model folder: its config.json in the terms of GGUF, and how tensors are called there.

An architecture that can be loaded from a folder has `MODEL_TYPES` (names as in `model_type` of config.json) and
`from_config(config) -> Translation`. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from edgelm.files.folder import Config

__all__ = ["Config", "FromFolder", "Translation"]


class Translation(NamedTuple):
    """A config in GGUF's terms, and what differs between the folder's tensors and those of a GGUF file."""

    metadata: Mapping[str, Any]
    """The architecture's keys, without its name in front."""
    names: Mapping[str, str]
    """Modules by GGUF's names: of a block by what follows `model.layers.N.`, others by their whole name."""
    vectors: Mapping[str, Sequence[float]] = {}
    """Tensors that GGUF files have and folders compute."""
    norm_plus: float = 0.0
    """What is added to every norm's scale."""
    ignored: tuple[str, ...] = ()
    """Beginnings of the names of tensors that the model does without: buffers, and what is not text."""


class FromFolder(Protocol):
    """The part of an architecture that folders need."""

    MODEL_TYPES: tuple[str, ...]

    def from_config(self, config: Config) -> Translation:
        """Raises `UnsupportedModel` for a config that asks for more than the architecture does."""
