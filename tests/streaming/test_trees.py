"""Passes over trees of drafted ids: a row sees its ancestors only; what is kept is as if it had been appended."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engines import BACKENDS, budgets, engine_at, need, shrink

from edgelm.engine.forward import Engine
from edgelm.engine.loading import open_path
from edgelm.engine.rows import Rows
from edgelm.memory.arena import depths, is_chain
from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm.text.tokenizer import load_tokenizer

IDS = [int(i) for i in np.random.default_rng(5).integers(3, 90, 40)]
CHAIN = (-1, 0, 1, 2, 3)
TREE = (-1, -1, 0, 1, 2, 2, 4, 0)
NOISE = {"numpy": 2e-3, "llamacpp": 0.05, "mlx": 0.02, "onnx": 0.05, "npu": 0.05}
"""What other places in the cache and other widths of a pass change in logits of tiny models."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name) for name in ("llama", "gemma3")}


@pytest.fixture(autouse=True)
def tiny_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def path_to(row: int, parents: tuple[int, ...]) -> list[int]:
    rows = [row]
    while parents[rows[0]] >= 0:
        rows.insert(0, parents[rows[0]])
    return rows


def test_depths_and_chains() -> None:
    assert depths(TREE).tolist() == [0, 0, 1, 1, 2, 2, 3, 1]
    assert all(map(is_chain, (CHAIN, ())))
    assert not is_chain(TREE)
    with pytest.raises(ValueError, match="parents come first"):
        depths((-1, 2, 0))


@pytest.mark.parametrize("backend", [*BACKENDS, "npu"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("parents", [CHAIN, TREE], ids=["chain", "tree"])
def test_rows_see_their_ancestors_only(
    models: dict[str, Path], backend: str, architecture: str, parents: tuple[int, ...]
) -> None:
    """Gemma's windows of sixteen are crossed; the smallest budget streams, the largest keeps everything."""
    path, drafted = models[architecture], IDS[20 : 20 + len(parents)]
    for budget in (budgets(path, 3, need(backend), max_outputs=8)[1], GB):
        with engine_at(path, budget, backend=backend, max_outputs=8) as engine:
            assert bool(engine.plan.streamed) == (budget < GB)
            engine.forward(IDS[:20])
            rows = engine.verify(drafted, parents)
            assert engine.n_past == 20
            seen = np.stack([rows[row].copy() for row in range(len(rows))])
            for leaf in range(len(parents)):
                engine.truncate(20)
                for row in path_to(leaf, parents):
                    logits = engine.forward([drafted[row]])[-1]
                assert np.abs(logits - seen[leaf]).max() < NOISE[backend]
                if engine.truncate(20) != 20:  # a ring has lost what came before
                    engine.forward(IDS[:20])


@pytest.mark.parametrize("backend", [*BACKENDS, "npu"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_is_kept_is_as_if_it_had_been_appended(models: dict[str, Path], backend: str, architecture: str) -> None:
    path, drafted = models[architecture], IDS[20 : 20 + len(TREE)]
    with engine_at(path, GB, backend=need(backend), speculate=True) as engine:
        for leaf in (6, 5, 3, 7):
            engine.truncate(0)
            engine.forward(IDS[:20])
            kept = path_to(leaf, TREE)
            engine.verify(drafted, TREE)
            engine.keep(kept)
            assert engine.n_past == 20 + len(kept)
            caches = [engine.arena.export(0, 20, len(kept))]
            after = engine.forward(IDS[:3])[-1].copy()
            engine.truncate(0)
            engine.forward(IDS[:20])
            engine.forward([drafted[row] for row in kept])
            caches.append(engine.arena.export(0, 20, len(kept)))
            for ours, theirs in zip(*caches, strict=True):
                assert np.abs(ours - theirs).max() < NOISE[backend]
            assert np.abs(engine.forward(IDS[:3])[-1] - after).max() < NOISE[backend]


def same_bits_in_a_chain_as_alone(engine: Engine, ids: list[int], n_past: int) -> bool:
    """Compare the logits of passes of one with those of a chain of the same ids."""
    engine.forward(ids[:n_past])
    alone = [engine.forward([token])[-1].copy() for token in ids[n_past:]]
    engine.truncate(n_past)
    rows = engine.verify(ids[n_past:], range(-1, len(alone) - 1))
    return all(np.array_equal(rows[i], logits) for i, logits in enumerate(alone))


@pytest.mark.models
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_ggml_gives_a_row_the_same_bits_in_a_chain_as_alone(real_model: Callable[[str], Path], name: str) -> None:
    """With 8-bit activations the smallest difference of a product can become one of half a logit."""
    path = real_model(name)
    ids = load_tokenizer(open_path(path)).encode(Path(__file__).parents[2].joinpath("bench/prompt.txt").read_text())
    with engine_at(path, GB, backend=need("llamacpp"), context=256, speculate=True) as engine:
        assert engine.max_rows > 7
        assert same_bits_in_a_chain_as_alone(engine, ids[: 200 + engine.max_rows], 200)


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_it_does_so_with_every_kernel(tmp_path: Path, type_name: str) -> None:
    """Some kernels are other ones for more than one row, or for more than seven."""
    path = tiny_model(tmp_path / "tiny.gguf", "llama", types=type_name, n_embd=256, n_ff=512)
    for width in (2, 4, 9, 16):
        with engine_at(path, GB, backend=need("llamacpp"), max_outputs=width) as engine:
            assert same_bits_in_a_chain_as_alone(engine, IDS[: 20 + width], 20), width


def test_what_nobody_keeps_is_forgotten(models: dict[str, Path]) -> None:
    with engine_at(models["gemma3"], GB, speculate=True) as engine:
        engine.forward(IDS[:20])
        expected = engine.forward(IDS[20:22])[-1].copy()
        engine.truncate(0)
        engine.forward(IDS[:20])
        for _ in range(3):
            engine.verify(IDS[30:38], TREE)
        assert np.abs(engine.forward(IDS[20:22])[-1] - expected).max() < NOISE["numpy"]
        assert engine.n_past == 22


def test_rows_of_drafts_are_the_first_to_go(models: dict[str, Path]) -> None:
    """While weights stream, less memory never means more rows; that all weights stay is worth more than rows."""
    path = models["llama"]
    found = []
    for budget in [*budgets(path, 6), GB]:
        with engine_at(path, budget, speculate=True) as engine:
            found.append(engine.max_rows)
            assert engine.plan.planned_bytes <= budget
    *streaming, just_resident, roomy = found
    assert all(less <= more for less, more in pairwise(streaming))
    assert (streaming[0], just_resident, roomy) == (1, 1, 16)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_rows_are_put_together_from_tiles(kind: type) -> None:
    logits = np.random.default_rng(3).standard_normal((5, 60)).astype(kind)
    for cuts in ([], [7, 31]):
        rows = Rows(np.split(logits, cuts, axis=1))
        for row in range(len(rows)):
            assert rows[row].dtype == np.float32
            assert np.array_equal(rows[row], logits[row])


def test_more_trees_than_compiled_passes(models: dict[str, Path]) -> None:
    """Passes are compiled once for each width, form and length, whatever order they come in."""
    with engine_at(models["llama"], GB, speculate=True) as engine:
        engine.forward(IDS[:20])
        compiled = []
        compile_one = engine.session.compile
        engine.session.compile = lambda *args: compiled.append(args) or compile_one(*args)  # type: ignore[method-assign, func-returns-value]
        for _ in range(3):
            for width in (2, 4, 8, 16, 1, 12):
                engine.verify(IDS[:width], range(-1, width - 1))
        assert len(compiled) == 6


@pytest.mark.parametrize("seed", range(6))
def test_rounds_of_any_trees_leave_the_cache_of_what_was_kept(models: dict[str, Path], seed: int) -> None:
    """Random trees, paths, chains and plain passes, over full caches and rings that wrap; streamed and resident."""
    rng = np.random.default_rng(seed)
    path = models["gemma3" if seed % 2 else "llama"]
    budget = GB if seed % 3 else budgets(path, 3, max_outputs=8)[1]
    with (
        engine_at(path, budget, max_outputs=8) as engine,
        engine_at(path, GB) as plain,
    ):
        stored = IDS[:12]
        engine.forward(stored)
        while engine.n_past < 48:
            n = int(rng.integers(1, 9))
            parents = [int(rng.integers(-1, row)) for row in range(n)]
            ids = rng.integers(3, 250, n).tolist()
            engine.verify(ids, parents)
            kept = path_to(int(rng.integers(n)), tuple(parents)) if rng.random() < 0.8 else []
            engine.keep(kept)
            stored = [*stored, *(ids[row] for row in kept)]
            assert engine.n_past == len(stored)
        last = stored[-1:]
        plain.forward(stored)
        for layer in range(len(plain.arena.layers)):
            n_held = min(len(engine.arena.held(layer)), len(plain.arena.held(layer)), 16)
            assert n_held == 16
            for ours, theirs in zip(
                engine.arena.export(layer, len(stored) - n_held, n_held),
                plain.arena.export(layer, len(stored) - n_held, n_held),
                strict=True,
            ):
                assert np.abs(ours - theirs).max() < 0.02
        assert np.abs(engine.forward(last)[-1] - plain.forward(last)[-1]).max() < 0.02
