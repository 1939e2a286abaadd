"""An adaptive model and a hungry neighbour under one real limit of the kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.sizes import MB
from edgelm.testing import tiny_model

LIMIT, BUDGET = "280MB", "180MB"
N_TOKENS = 12

MODEL = f"""
import json, select, sys
import edgelm

said = []
with edgelm.load(sys.argv[1], memory="{BUDGET}", backend="numpy", context=128, adaptive=said.append) as model:
    while not select.select([sys.stdin], [], [], 0)[0]:
        chunks = list(model.stream("once upon", max_tokens={N_TOKENS}, ignore_eos=True))
        ids = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
        used = chunks[-1].usage
        print(json.dumps({{"ids": ids, "budget": used.budget_bytes, "rss": used.rss_bytes, "said": said}}), flush=True)
"""

NEIGHBOUR = """
import sys, time

blocks = []
for _ in range(int(sys.argv[1])):
    blocks.append(bytearray(b"x") * 5_000_000)
    time.sleep(0.1)
print("full", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(group: Any, code: str, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code in the group while inside; at the end its input ends, and it is waited for."""
    child = subprocess.Popen(
        group.command([sys.executable, "-c", code, *argv]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # memory is what counts here: no core is taken from the monitor and the neighbour
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        yield child
        child.communicate(timeout=30)
    finally:
        child.kill()
        child.communicate()


def rounds_until(child: subprocess.Popen[str], what: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Read what the model says after each answer, until `what` is true of it."""
    seen: list[dict[str, Any]] = []
    assert child.stdout is not None
    for line in child.stdout:
        seen.append(json.loads(line))
        if what(seen[-1]):
            return seen
    raise AssertionError(f"the model ended with code {child.wait()}; last it said {seen[-1:]}")


@pytest.mark.slow
@pytest.mark.device
def test_a_hungry_neighbour_gets_memory_and_the_answers_stay_the_same(
    tmp_path: Path, memory_group: Callable[[str], Any]
) -> None:
    shape: dict[str, Any] = {"n_layers": 8, "n_embd": 512, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "n_ff": 2048}
    path = tiny_model(tmp_path / "large.gguf", "llama", n_vocab=2048, **shape)
    assert 100 * MB < path.stat().st_size < 140 * MB
    with edgelm.load(path, memory="1GB", backend="numpy", context=128) as still:
        chunks = list(still.stream("once upon", max_tokens=N_TOKENS, ignore_eos=True))
    expected = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
    group = memory_group(LIMIT)
    with running(group, MODEL, str(path)) as model:
        seen = rounds_until(model, lambda _: True)
        full = seen[-1]["rss"]
        with running(group, NEIGHBOUR, "28") as neighbour:  # 140 MB: together more than the limit
            seen += rounds_until(model, lambda now: now["budget"] < full - 40 * MB)
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == "full\n"
            seen += rounds_until(model, lambda now: now["rss"] < full - 40 * MB)
        least = seen[-1]["budget"]
        assert neighbour.returncode == 0
        seen += rounds_until(model, lambda now: now["budget"] > least + 20 * MB)
    assert model.returncode == 0
    assert group.oom_kills == 0
    assert all(one["ids"] == expected for one in seen)
    assert all(one["budget"] <= 180 * MB for one in seen)
    assert seen[-1]["said"][0].startswith("memory is short: budget 180 MB -> ")
    assert seen[-1]["said"][-1].startswith("memory is free again: budget ")
