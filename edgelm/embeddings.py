"""Texts to vectors with a loaded model: tokens, passes, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgelm.engine.embedding import POOLINGS, Floats, Pooling, encode, normalized, pool, pooling_of
from edgelm.engine.running import Running
from edgelm.errors import ConfigError, UnsupportedModel

if TYPE_CHECKING:
    from edgelm.model import Model


def must_write(model: Model) -> None:
    """Raise `UnsupportedModel` for a model that embeds texts."""
    if model.embeds:
        raise UnsupportedModel(
            f"{model.file.architecture} models embed texts, they write none; use `embed` (`edgelm embed`), "
            "or a model for chats"
        )


def embedded(
    model: Model, engine: Running, texts: Sequence[str], normalize: bool, pooling: Pooling | None
) -> list[Floats]:
    """Return the vector [dim] of each text; of pooling "none", the rows [n_tokens, dim]."""
    if not model.embeds:
        raise UnsupportedModel(
            f"{model.file.architecture} models write texts, they embed none; use a model such as all-MiniLM-L6-v2, "
            "bge or nomic-embed-text"
        )
    if isinstance(texts, str):
        raise ConfigError("texts must be a list of strings, got one string; put it in a list")
    pooling = pooling_of(model.file) if pooling is None else pooling
    if pooling not in POOLINGS:
        raise ConfigError(f"unknown pooling {pooling!r} (known: {', '.join(POOLINGS)})")
    found: list[Floats] = []
    turn = model.turns.ask()
    with model.turns.held(turn, None):
        for text in texts:
            ids = model.tokenizer.encode(text)
            if not ids:
                raise ConfigError("a text is empty and the file puts nothing around it; give at least one token")
            vectors = pool(encode(engine, ids), pooling)
            found.append(normalized(vectors) if normalize else vectors)
            model.turns.breathe(turn)
    return found


def as_matrix(vectors: Sequence[Floats], dim: int) -> Floats:
    """Return vectors [dim] as float32 [n, dim]."""
    if any(vector.ndim != 1 for vector in vectors):
        raise ConfigError(
            "the model's file pools nothing: there is a vector for each token; choose a pooling (mean, cls, last), "
            "or use embed_tokens"
        )
    return np.stack(vectors) if vectors else np.empty((0, dim), np.float32)
