"""Keys and values in fewer bits, in a cache that takes memory as it grows."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import need, shrink

import edgelm
from edgelm import opening
from edgelm.concessions import concessions
from edgelm.engine.cache_types import AUTO, parse_types
from edgelm.engine.choosing import Asked, consider
from edgelm.engine.health import check
from edgelm.engine.loading import open_path
from edgelm.engine.phased import PhasedEngine
from edgelm.engine.wishes import Wishes
from edgelm.errors import ConfigError, UnsupportedModel
from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import TensorType
from edgelm.files.quantize import from_blocks, to_blocks, to_q4_0, to_q8_0
from edgelm.memory.arena import KVArena, LayerCache
from edgelm.memory.cache_layout import CacheLayout, vector_bytes
from edgelm.memory.platform import current_platform
from edgelm.sizes import GB, MIB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(8).integers(3, 250, 40).tolist()
LOST = {"q8_0": 0.4, "q8_0:f16": 0.4, "f16:q8_0": 0.4, "q4_0": 4.0, "q8_0:q4_0": 3.0}
"""What logits of a tiny model may move by, which are some units large."""


pytestmark = pytest.mark.usefixtures("known_rates")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    wide = {"head_dim": 32}
    return {
        name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384, **wide) for name in ("llama", "gemma3", "gemma2")
    }


# --- rounding


@pytest.mark.parametrize(("name", "rounded"), [("Q8_0", to_q8_0), ("Q4_0", to_q4_0)])
def test_blocks_are_rounded_as_ggml_rounds_them(name: str, rounded: object) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="ggml is the oracle here")
    import ctypes

    library = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))))
    quantize = getattr(library, f"quantize_row_{name.lower()}_ref")
    numbers = np.random.default_rng(0).normal(0, 3, (64, 128)).astype(np.float32)
    numbers[0] = 0.0
    numbers[1, :32] = 1.5
    ours = rounded(numbers)  # type: ignore[operator]
    theirs = np.empty(ours.size, np.uint8)
    quantize(
        numbers.ctypes.data_as(ctypes.c_void_p), theirs.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(numbers.size)
    )
    assert np.array_equal(ours.reshape(-1), theirs)
    assert ours.shape[1] == vector_bytes(name.lower(), 128)  # type: ignore[arg-type]
    assert np.abs(dequantize(TensorType[name], ours) - numbers).max() < (0.1 if name == "Q8_0" else 1.5)


@pytest.mark.parametrize("item", ["q8_0", "q4_0"])
def test_numbers_that_were_rounded_once_are_not_rounded_again(item: str) -> None:
    numbers = np.random.default_rng(0).normal(0, 3, (64, 128)).astype(np.float32)
    numbers[0], numbers[1, :32], numbers[2, :32], numbers[2, 32] = 0.0, -1.5, np.tile([2.0, -2.0], 16), 1e-3
    once = from_blocks(item, to_blocks(item, numbers))
    assert np.array_equal(from_blocks(item, to_blocks(item, once)), once)
    assert not np.array_equal(once, numbers)


# --- models


@pytest.mark.parametrize("backend", ["numpy", "llamacpp"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma2"])
@pytest.mark.parametrize("kv", ["q8_0", "q4_0", "q8_0:q4_0", "q8_0:f16", "f16:q8_0"])
def test_fewer_bits_change_logits_a_little_and_memory_a_lot(
    models: dict[str, Path], backend: str, architecture: str, kv: str
) -> None:
    """With rings that are crossed and soft-capped scores."""
    scores = {}
    for types in ("f16", kv):
        with edgelm.load(
            models[architecture], memory=GB, backend=need(backend), threads=1, context=64, kv=types
        ) as model:
            scores[types] = model.score_ids(IDS, 4), model.plan.demand.kv_bytes
    ours, plain = (np.array(scores[types][0].logprobs) for types in (kv, "f16"))
    assert 0 < np.abs(ours - plain).max() < LOST[kv]
    bits = {"f16": 16, "q8_0": 8.5, "q4_0": 4.5}
    keys, _, values = kv.partition(":")
    least = (bits[keys] + bits[values or keys]) / 32
    assert scores[kv][1] == pytest.approx(scores["f16"][1] * least, rel=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("kv", ["q8_0", "q8_0:q4_0", "f16:q8_0", "q8_0:f16"])
def test_prompts_and_single_tokens_see_the_same_cache(models: dict[str, Path], kv: str, architecture: str) -> None:
    """ggml has one form of attention for wide passes and another one for narrow ones; NumPy is the oracle of both."""
    prompt = IDS * 4
    found = []
    for backend in ("numpy", need("llamacpp")):
        with edgelm.load(models[architecture], memory=GB, backend=backend, threads=1, context=256, kv=kv) as model:
            wide = model._engine.forward(prompt).copy()
            narrow = [model._engine.forward([token]).copy() for token in IDS[:5]]
            model._engine.truncate(len(prompt) - 1)
            again = model._engine.forward(prompt[-1:]).copy() if architecture == "llama" else wide
            found.append(np.concatenate([wide, *narrow, again]))
    assert np.abs(found[0] - found[1]).max() < 0.3
    assert np.abs(found[1][0] - found[1][-1]).max() < 0.2


def test_both_backends_round_alike(models: dict[str, Path]) -> None:
    found = []
    for backend in ("numpy", need("llamacpp")):
        with edgelm.load(models["llama"], memory=GB, backend=backend, threads=1, context=64, kv="q8_0") as model:
            found.append(np.array(model.score_ids(IDS, 4).logprobs))
    assert np.abs(found[0] - found[1]).max() < 0.2


def test_auto_takes_fewer_bits_where_that_keeps_the_weights_in_memory(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    options = {"backend": "numpy", "threads": 1, "context": 1024, "speculate": False}
    path = models["llama"]
    monkeypatch.setattr(opening, "process_bytes_of", lambda _: 0)
    plain = edgelm.plan(path, memory=GB, **options)  # type: ignore[arg-type]
    assert edgelm.plan(path, memory=GB, kv="auto", **options).demand.kv == "f16"  # type: ignore[arg-type]
    tight = edgelm.plan(path, memory=plain.planned_bytes - 50_000, kv="auto", **options)  # type: ignore[arg-type]
    assert tight.demand.kv == "q8_0"
    assert "KV cache, q8_0" in dict(tight.items())
    assert not tight.streamed


def test_what_cannot_be_is_a_sentence(models: dict[str, Path], tmp_path: Path) -> None:
    assert parse_types("auto") == AUTO
    assert parse_types("q8_0:q4_0") == (("q8_0", "q4_0"),)
    for wrong in ("q5", "f16:", "q8_0:nope", "f32"):
        with pytest.raises(ConfigError, match="unknown type"):
            parse_types(wrong)
    for name in ("mlx", "onnx", "npu"):
        if check(name).available:
            with pytest.raises(UnsupportedModel, match=f"the {name} backend keeps keys and values as f16 only"):
                edgelm.plan(models["llama"], memory=GB, backend=name, kv="q8_0")
    with pytest.raises(UnsupportedModel, match=r"use .*--backend numpy or --kv f16"):
        edgelm.plan(models["llama"], memory=GB, backend="npu", kv="q8_0")
    odd = tiny_model(tmp_path / "odd.gguf", "llama", n_vocab=384)
    with pytest.raises(UnsupportedModel, match="cannot be cut into blocks of 32"):
        edgelm.plan(odd, memory=GB, backend="numpy", kv="q8_0")


def test_a_backend_that_has_the_types_is_chosen(models: dict[str, Path]) -> None:
    """And one that lacks them is not even measured."""
    asked = Asked(str(models["llama"]), GB, 1, Wishes(kv="q4_0"))
    found = {one.name: one for one in consider(open_path(models["llama"]), asked)}
    for name in ("mlx", "onnx"):
        if check(name).available:
            assert "it keeps keys and values as f16 only, not as q4_0" in found[name].reason
            assert found[name].planned_bytes is None
    assert next(iter(found.values())).name == ("llamacpp" if check("llamacpp").available else "numpy")
    assert next(iter(found.values())).chosen


def test_two_backends_keep_what_was_asked_for_where_they_can(models: dict[str, Path]) -> None:
    """The simulated NPU hands float16 over; NumPy beside llama.cpp shares its cache."""
    prompt = IDS * 2
    for name, shared in (("npu+numpy", False), (f"numpy+{need('llamacpp')}", True)):
        with edgelm.load(models["llama"], memory=GB, backend=name, threads=1, context=128, kv="q8_0") as model:
            engine = model._engine
            assert isinstance(engine, PhasedEngine)
            assert engine.arena.layout.items == ("q8_0", "q8_0")
            assert (engine.prompts.arena is engine.arena) == shared
            ours = engine.forward(prompt).copy()
            assert any("kept as q8_0" in note for note in model.notes)
        with edgelm.load(models["llama"], memory=GB, backend="numpy", threads=1, context=128) as model:
            plain = model._engine.forward(prompt).copy()
        assert np.abs(ours - plain).max() < (2.0 if "npu" in name else 0.4)


def test_what_goes_to_flash_is_said_to_be_f16(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(opening, "process_bytes_of", lambda _: 0)
    path, context = models["llama"], 16384
    options: dict[str, Any] = {"backend": "numpy", "threads": 1, "context": context, "speculate": False}
    whole = edgelm.plan(path, memory=GB, kv="q4_0", **options)
    plan = edgelm.plan(path, memory=whole.planned_bytes - whole.demand.kv_bytes // 2, kv="q4_0", **options)
    assert plan.demand.spill is not None
    assert plan.demand.kv == "f16"
    notes = concessions(plan, context)
    assert not any("q4_0" in note for note in notes)
    assert any("stay in memory, as f16" in note for note in notes)


# --- growing


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("backend", ["numpy", "llamacpp", "onnx", "mlx"])
def test_a_cache_that_grows_gives_the_bits_of_one_that_had_all_its_places(
    models: dict[str, Path], backend: str, architecture: str
) -> None:
    """Over steps of its length, back, and over them again."""
    ids = np.random.default_rng(3).integers(3, 250, 600).tolist()
    found = []
    for eager in (False, True):
        with edgelm.load(
            models[architecture], memory=GB, backend=need(backend), threads=1, context=2048, speculate=False
        ) as model:
            engine, arena = model._engine, model._engine.arena
            if eager:
                arena.grow(2048)
            before = dict(arena.capacities)
            logits = [engine.forward(ids[:250]).copy()]
            logits += [engine.forward([token]).copy() for token in ids[250:262]]
            logits.append(engine.forward(ids[262:]).copy())
            grown = arena.capacities != before
            if architecture == "llama":
                assert engine.truncate(255) == 255
                logits += [engine.forward([token]).copy() for token in ids[255:258]]
            found.append((grown, logits))
    assert [grown for grown, _ in found] == [True, False]
    for lazy, eager_logits in zip(found[0][1], found[1][1], strict=True):
        assert np.array_equal(lazy, eager_logits)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="Linux says there which pages are never huge")
def test_the_cache_takes_no_huge_pages() -> None:
    """Where the system forces them on everything, a first token would take two megabytes of each layer."""
    arena = KVArena([LayerCache(0, 0, 3, 64, 64)] * 30, 8192, 512)
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    inside = [
        flags.split("\n")[0].split()
        for before, flags in itertools.pairwise(maps)
        if (spans := re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", before, re.MULTILINE))
        and int(spans[-1][0], 16) <= arena.keys[0] < int(spans[-1][1], 16)
    ]
    assert len(inside) == 1
    assert "nh" in inside[0]
    arena.close()


def resident() -> int:
    return current_platform().rss_bytes()


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="resident pages are counted by Linux here")
@pytest.mark.parametrize("kinds", [("f16", "dim_place"), ("f16", "place_dim"), ("q8_0", "place_dim")])
def test_the_cache_takes_pages_as_it_grows_and_gives_them_back(kinds: tuple[str, str]) -> None:
    """vAttention's test, with steps of 256 places: an eighth of a context takes an eighth of the memory."""
    item, order = kinds
    layers = [LayerCache(0, 0, 3, 64, 64)] * 30
    layout = CacheLayout(item, order)  # type: ignore[arg-type]
    arena = KVArena(layers, 8192, 512, layout)
    per_token = arena.n_bytes // 8192
    before, mask, places = resident(), np.empty((512, 8192), np.float32), np.empty(512, np.int64)
    mask.fill(0.0)
    before = resident()
    numbers = np.random.default_rng(0).normal(0, 1, (512, 3, 64)).astype(np.float32)
    for n_past in (0, 512):
        arena.claim(0, 512, places, mask[:, : arena.length(0, 512)])
        arena.advance(512)
        for layer in range(30):
            arena.import_(layer, n_past, numbers, -numbers)
    taken = resident() - before
    assert 0.95 * 1024 * per_token < taken < 1024 * per_token + 2 * MIB
    keys, values = arena.export(7, 500, 300)
    assert np.abs(keys - numbers[np.arange(500, 800) % 512]).max() < 0.05
    assert np.abs(values + numbers[np.arange(500, 800) % 512]).max() < 0.05
    assert arena.truncate(0) == 0
    assert resident() - before < MIB
    arena.close()


@pytest.mark.parametrize("values", ["dim_place", "place_dim"])
def test_rows_that_move_apart_and_together_keep_their_numbers(values: str) -> None:
    rng = np.random.default_rng(1)
    layers = [LayerCache(0, 0, 2, 8, 16), LayerCache(1, 300, 1, 8, 8)]
    arena = KVArena(layers, 4096, 64, CacheLayout("f32", values))  # type: ignore[arg-type]
    stored = [np.empty((0, layer.n_kv_heads, dim), np.float32) for layer in layers for dim in layer[3:]]
    for step in (64, 64, 64, 64, 64, -250, 64, 64):
        if step < 0:
            kept = arena.truncate(arena.n_past + step)
            stored = [one[:kept] for one in stored]
            continue
        while arena.n_past % 64 or step:
            places = {group: np.empty(step, np.int64) for group in (0, 1)}
            for group in (0, 1):
                arena.claim(group, step, places[group], np.empty((step, arena.length(group, step)), np.float32))
            arena.advance(step)
            first = arena.n_past - step
            new = [
                rng.normal(size=(step, layer.n_kv_heads, dim)).astype(np.float32)
                for layer in layers
                for dim in layer[3:]
            ]
            for layer in range(2):
                arena.import_(layer, first, new[2 * layer], new[2 * layer + 1])
            stored = [np.concatenate(pair) for pair in zip(stored, new, strict=True)]
            break
    for layer in range(2):
        first = int(arena.held(layer)[0])
        for ours, theirs in zip(
            arena.export(layer, first, arena.n_past - first), stored[2 * layer : 2 * layer + 2], strict=True
        ):
            assert np.array_equal(ours, theirs[first:])


def test_a_plan_counts_the_whole_context(models: dict[str, Path]) -> None:
    sizes = {
        context: edgelm.plan(models["llama"], memory=GB, backend="numpy", threads=1, context=context).demand.kv_bytes
        for context in (1024, 4096)
    }
    assert sizes[4096] == 4 * sizes[1024]
