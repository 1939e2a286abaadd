"""Load a tiny model, and read its streams."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgelm
from edgelm import Chunk, Model

BUDGET = 2_000_000_000
PATIENCE_S = 20.0
PROMPT = "the cat and the dog"


def load(path: Path, **options: Any) -> Model:
    return edgelm.load(path, **{"memory": BUDGET, "backend": "numpy", "threads": 1, "context": 128, **options})


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token_id for chunk in chunks if chunk.token_id is not None]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"


def long(model: Model, **options: Any) -> Any:
    """A stream of many tokens, unless something stops it."""
    return model.stream(PROMPT, max_tokens=100, ignore_eos=True, **options)
