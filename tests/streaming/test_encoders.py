"""Models that embed texts, streamed: the same bits at every budget."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from engines import budgets, engine_at, need, shrink

from edgelm.engine.embedding import encode
from edgelm.errors import ContextOverflow
from edgelm.files import open_model
from edgelm.testing.tiny_encoder import ENCODERS, tiny_encoder, tiny_gemma_embedding
from edgelm.text.tokenizer import load_tokenizer

TEXT = "The weather in the town is 12 and cold, or so they say!"
MAKERS: dict[str, Callable[..., Path]] = {name: partial(tiny_encoder, architecture=name) for name in ENCODERS}
MAKERS["dense layers"] = partial(tiny_gemma_embedding, dense=512)


@pytest.mark.parametrize("model", MAKERS)
@pytest.mark.parametrize("backend", ["numpy", "llamacpp"])
def test_vectors_keep_every_bit(model: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    path = MAKERS[model](tmp_path / "tiny.gguf", n_embd=128, types="Q4_0")
    ids = load_tokenizer(open_model(path), cache_dir=tmp_path).encode(TEXT)
    found, streamed = [], []
    for budget_bytes in budgets(path, 4, need(backend)):
        with engine_at(path, budget_bytes, backend=backend) as engine:
            found += [encode(engine, ids) for _ in range(2)]
            streamed.append(engine.bytes_streamed)
            assert engine.plan.demand.kv_bytes == 0
            assert engine.plan.planned_bytes <= budget_bytes
            assert engine.n_past == 0
            with pytest.raises(ContextOverflow, match=r"65 tokens.*64"):
                encode(engine, [5] * 65)
    assert streamed[0] > 0 == streamed[-1]
    for one in found[1:]:
        assert np.array_equal(one, found[0])
