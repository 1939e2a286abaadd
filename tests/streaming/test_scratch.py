"""What is reserved for the largest pass does for all others: prompts of any length, at any context."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import BACKENDS, need

import edgelm
from edgelm.testing import tiny_model

LENGTHS = (3, 90, 300, 600, 1030)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("threads", [1, 2])
def test_prompts_of_any_length(
    tmp_path: Path, known_rates: None, backend: str, architecture: str, threads: int
) -> None:
    need(backend)
    path = tiny_model(tmp_path / "tiny.gguf", architecture)
    with edgelm.load(path, memory="2GB", backend=backend, threads=threads, context=4096) as model:
        for n in LENGTHS:
            ids = [5 + (i + n) % 80 for i in range(n)]
            (last,) = [chunk.usage for chunk in model.stream_ids(ids, max_tokens=2) if chunk.finish_reason]
            assert last.prompt_tokens == n
