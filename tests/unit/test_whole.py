"""Models that are one ONNX graph, computed: the oracle's numbers, turns, cancelling, budgets, and any damaged file."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgelm
from edgelm.engine.whole import WholeEngine
from edgelm.engine.wishes import Wishes
from edgelm.errors import BudgetTooSmall, Cancelled, ConfigError, ContextOverflow
from edgelm.opening import open_engine
from edgelm.testing import tiny_model
from edgelm.testing.evaluate import evaluate
from edgelm.testing.tiny_genai import tiny_genai

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
IDS = np.random.default_rng(7).integers(0, 250, 60).tolist()
CONTEXT = 96
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "qwen2, biases": ("qwen2", {}, {}),
    "weights inside": ("llama", {}, {"inline": True}),
    "logits of the last token": ("llama", {}, {"last_only": True}),
    "float16 caches": ("llama", {}, {"cache": "float16"}),
    "caches that are copied": ("llama", {"n_kv_heads": 4}, {"in_place": False}),
    "copied, last token": ("llama", {"n_kv_heads": 4}, {"in_place": False, "last_only": True}),
}


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[WholeEngine]:
    engine = open_engine(folder, Wishes(**{"memory": "1GB", "context": CONTEXT, "threads": 1, **options})).engine
    assert isinstance(engine, WholeEngine)
    try:
        yield engine
    finally:
        engine.close()


def rows(engine: WholeEngine, ids: list[int]) -> npt.NDArray[np.float32]:
    """Return the logits after every one of `ids`, a pass each."""
    return np.concatenate([engine.forward([token])[-1:].copy() for token in ids])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, npt.NDArray[np.float32]]]:
    """Return the folder of a variant, and the oracle's logits of the same weights."""
    made: dict[str, tuple[Path, npt.NDArray[np.float32]]] = {}

    def get(variant: str) -> tuple[Path, npt.NDArray[np.float32]]:
        if variant not in made:
            architecture, spec, options = VARIANTS[variant]
            place = tmp_path_factory.mktemp("whole")
            oracle = evaluate(tiny_model(place / "m.gguf", architecture, **spec), IDS)
            made[variant] = tiny_genai(place / "model", architecture, **spec, **options), oracle
        return made[variant]

    return get


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_the_oracles(variant: str, tiny: Any) -> None:
    folder, oracle = tiny(variant)
    bound = 4e-3 * np.abs(oracle).max()  # caches are float16 there
    with opened(folder) as engine:
        assert np.abs(rows(engine, IDS) - oracle).max() < bound
        assert engine.truncate(0) == 0
        assert np.abs(engine.forward(IDS)[-1] - oracle[-1]).max() < bound
        assert engine.n_past == len(IDS)


@pytest.mark.parametrize("variant", ["llama", "caches that are copied"])
def test_a_forgotten_end_leaves_no_trace(variant: str, tiny: Any) -> None:
    folder, _ = tiny(variant)
    with opened(folder) as engine:
        fresh = engine.forward(IDS)[-1].copy()
        for kept in (40, 17, 1):
            engine.truncate(kept)
            engine.forward([5, 6, 7, 8])
            assert engine.truncate(kept) == kept
            again = engine.forward(IDS[kept:])[-1]
            assert np.abs(again - fresh).max() < 1e-4
        assert engine.truncate(10**6) == len(IDS)


def test_several_rows_of_logits(tiny: Any) -> None:
    folder, oracle = tiny("llama")
    with opened(folder, max_outputs=4) as engine:
        found = engine.forward(IDS, n_outputs=4)
        assert found.shape == (4, oracle.shape[1])
        assert found.dtype == np.float32
        assert np.abs(found - oracle[-4:]).max() < 4e-3 * np.abs(oracle).max()
        with pytest.raises(ValueError, match="5 rows"):
            engine.forward(IDS[:6], n_outputs=5)
    with pytest.raises(ConfigError, match="one token at a time"):
        open_engine(tiny("logits of the last token")[0], Wishes(memory="1GB", max_outputs=2))


@pytest.mark.parametrize("variant", ["llama", "float16 caches"])
def test_guesses_are_verified_in_a_chain_and_what_is_kept_counts(variant: str, tiny: Any) -> None:
    folder, oracle = tiny(variant)
    bound = 4e-3 * np.abs(oracle).max()
    with opened(folder) as engine:
        assert not engine.trees
        assert engine.max_rows == engine.plan.chunk
        engine.forward(IDS[:20])
        for n_right in (3, 0, 1):  # the others are guesses that were wrong
            n_past = engine.n_past
            right = IDS[n_past : n_past + n_right]
            rows_found = engine.verify([*right, *[9] * (6 - n_right)], range(-1, 5))
            assert (engine.n_past, len(rows_found)) == (n_past, 6)
            for row in range(n_right):
                assert np.abs(rows_found[row] - oracle[n_past + row]).max() < bound
            engine.keep(range(n_right))
            assert engine.n_past == n_past + n_right
        engine.verify([9, 9], (-1, 0))  # which nobody keeps
        n_past = engine.n_past
        assert np.abs(engine.forward(IDS[n_past:])[-1] - oracle[-1]).max() < bound
        with pytest.raises(AssertionError, match="do not branch"):
            engine.verify([1, 2], (-1, -1))
    with opened(tiny("caches that are copied")[0]) as engine:
        assert engine.max_rows == 1


def test_guessing_changes_no_answer_of_a_graph(tiny: Any) -> None:
    folder, _ = tiny("llama")
    prompt = IDS[:8] * 3
    with edgelm.load(folder, memory="1GB", context=CONTEXT, threads=1) as model:
        plain, guessed = (
            [chunk.token_id for chunk in model.stream_ids(prompt, max_tokens=40, ignore_eos=True, speculate=speculate)]
            for speculate in (False, True)
        )
        assert plain == guessed
        with pytest.raises(ConfigError, match="one answer at a time"):
            model.samples_of(prompt, 2)
        (alone,) = model.samples_of(prompt, 1, max_tokens=5, ignore_eos=True)
        assert list(alone.token_ids) == plain[:5]
    with pytest.raises(ConfigError, match="one answer at a time"):
        edgelm.load(folder, memory="1GB", parallel=2)
    with pytest.raises(ConfigError, match="a draft model guesses for GGUF files"):
        edgelm.load(folder, memory="1GB", draft="auto")


def test_prompts_are_cut_and_every_cut_is_told(tiny: Any) -> None:
    folder, _ = tiny("llama")
    with opened(folder) as engine:
        assert engine.plan.chunk == 64
        seen: list[int] = []
        engine.forward([*IDS, *IDS[:30]], progress=seen.append)
        assert seen == [64]
        engine.truncate(0)
    with opened(tiny("caches that are copied")[0]) as engine:
        seen = []
        engine.forward(IDS[:5], progress=seen.append)
        assert seen == [1, 2, 3, 4]


def test_what_cannot_be_appended(tiny: Any) -> None:
    folder, _ = tiny("llama")
    with opened(folder) as engine:
        with pytest.raises(ConfigError, match="token ids"):
            engine.forward([10**6])
        with pytest.raises(ContextOverflow):
            engine.forward(IDS * 2)
        assert engine.n_past == 0
        engine.close()
        with pytest.raises(Cancelled):
            engine.forward([1])


def test_cancelling_breaks_off_a_pass_and_allows_the_next(tiny: Any) -> None:
    folder, oracle = tiny("llama")
    with opened(folder) as engine:
        engine.cancel()
        with pytest.raises(Cancelled):
            engine.forward(IDS)
        engine.cancel(on=False)
        engine._session.abort(True)  # as if the pass had begun already
        with pytest.raises(Cancelled):
            engine.forward(IDS)
        engine.cancel(on=False)
        assert engine.n_past == 0
        assert np.abs(engine.forward(IDS)[-1] - oracle[-1]).max() < 4e-3 * np.abs(oracle).max()


def test_a_chat_continues_what_is_in_the_cache(tiny: Any) -> None:
    folder, _ = tiny("llama")
    with edgelm.load(folder, memory="1GB", context=256, threads=1) as model:
        assert model.backend == "onnx"
        assert any("resident only" in note for note in model.notes)
        assert model.tokenizer.eos_ids >= {288}
        chat = model.chat("You are tiny.")
        first = list(chat.stream("the one", max_tokens=6, ignore_eos=True))
        assert first[-1].usage.cached_tokens == 0
        second = list(chat.stream("and another", max_tokens=6, ignore_eos=True))
        usage = second[-1].usage
        assert usage.cached_tokens > 30
        assert (usage.completion_tokens, usage.bytes_streamed) == (6, 0)
        assert usage.compute_s > 0
        threading.Timer(0.02, model.cancel).start()
        assert [chunk.finish_reason for chunk in model.stream_ids([1, 2], ignore_eos=True)][-1] in (
            "cancelled",
            "length",
        )
        ids = [chunk.token_id for chunk in model.stream_ids(IDS[:20], max_tokens=8, ignore_eos=True)]
    with edgelm.load(folder, memory="1GB", context=256, threads=1) as model:
        assert ids == [chunk.token_id for chunk in model.stream_ids(IDS[:20], max_tokens=8, ignore_eos=True)]


def test_another_budget_changes_the_promise_and_nothing_else(tiny: Any) -> None:
    folder, _ = tiny("llama")
    with edgelm.load(folder, memory="1GB", context=CONTEXT, threads=1) as model:
        needed = model.plan.planned_bytes
        assert model.set_budget(needed).budget_bytes == needed
        with pytest.raises(BudgetTooSmall) as refused:
            model.set_budget(needed - 1)
        assert refused.value.needed_bytes == needed
        assert model.plan.budget_bytes == needed
        model.generate("the", max_tokens=2)


PEAK = """
import sys, edgelm
from edgelm.memory.meter import Meter
folder, context, n_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
needed = 0
try:
    edgelm.plan(folder, memory=1, context=context, threads=2)
except edgelm.BudgetTooSmall as error:
    needed = error.needed_bytes
budget = needed + 2_000_000
with edgelm.load(folder, memory=budget, context=context, threads=2) as model:
    ids = [7 * i % 250 for i in range(context - n_tokens)]
    usage = list(model.stream_ids(ids, max_tokens=n_tokens, ignore_eos=True))[-1].usage
    assert usage.completion_tokens == n_tokens
print(budget, Meter().sample().peak_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="bounds are measured against Linux's peak")
@pytest.mark.parametrize(
    "options",
    [
        {"quantized": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"inline": True}, marks=pytest.mark.slow),
        pytest.param({"cache": "float16"}, marks=pytest.mark.slow),
    ],
)
def test_peak_stays_within_the_smallest_budget(options: dict[str, Any], tmp_path: Path) -> None:
    spec = {"n_embd": 512, "n_ff": 2048, "n_heads": 8, "head_dim": 64, "n_vocab": 8192, "n_context": 1024}
    folder = tiny_genai(tmp_path / "model", **spec, **options)
    argv = [sys.executable, "-c", PEAK, str(folder), "1024", "16"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    budget, peak = map(int, done.stdout.split())
    assert peak <= budget
    assert peak > 0.6 * budget, "a bound that is far off refuses budgets that would do"


FUZZ = """
import random, sys
from pathlib import Path
from edgelm.errors import EdgeLMError
from edgelm.engine.wishes import Wishes
from edgelm.opening import open_engine
sys.path.insert(0, sys.argv[3])
from test_files_onnx import damaged
path = Path(sys.argv[1]) / "model.onnx"
content, refused, ran = path.read_bytes(), 0, 0
for seed in range(int(sys.argv[2])):
    path.write_bytes(damaged(content, random.Random(seed)))
    print(seed, flush=True)
    try:
        engine = open_engine(path.parent, Wishes(memory="1GB", context=32, threads=1)).engine
        try:
            engine.forward([1, 2, 3])
            ran += 1
        finally:
            engine.close()
    except EdgeLMError:
        refused += 1
print("done", refused, ran)
"""


@pytest.mark.parametrize("options", [{"quantized": True}, {"inline": True}])
def test_no_graph_ends_the_process(options: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_genai(tmp_path / "model", n_layers=1, **options)
    argv = [sys.executable, "-c", FUZZ, str(folder), "60", str(Path(__file__).parent)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"after {done.stdout[-20:]}: {done.stderr}"
    _, refused, ran = done.stdout.splitlines()[-1].split()
    assert int(refused) > 15
    assert int(refused) + int(ran) == 60
