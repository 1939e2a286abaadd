"""Backends beside the oracle: the figures are right, and whatever a backend does, there is a table."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgelm
from edgelm.engine import registry
from edgelm.engine.backend import Availability
from edgelm.engine.health import check
from edgelm.errors import ConfigError, UnknownBackend, UnsupportedModel
from edgelm.files.gguf import open_model
from edgelm.parity import side
from edgelm.parity.measures import BadLogits, Comparison, log_softmax
from edgelm.parity.operations import errors_of
from edgelm.parity.report import Figures, Parity, Verification
from edgelm.parity.run import Run
from edgelm.parity.side import Side, SideFailed
from edgelm.parity.verify import TEXT
from edgelm.testing import ARCHITECTURES, tiny_folder, tiny_model
from edgelm.testing.evaluate import evaluate
from edgelm.text.tokenizer import load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "streaming"))
import layout_backends

_BACKEND = """
import os, signal, time
import numpy as np
from edgelm.errors import UnsupportedModel
from edgelm_numpy import NumpyBackend
from edgelm_numpy.session import NumpySession
from edgelm_numpy.frame import at

class Session(NumpySession):
    def compile(self, segment, shape):
        program = super().compile(segment, shape)
        run = program.run
        def changed(bindings):
            run(bindings)
            outputs = [at(a, (shape.rows(segment.values[v].per), segment.values[v].width), np.float32)
                       for v, a in zip(segment.outputs, bindings.outputs)]
            {change}
        program.run = changed
        return program

class Backend(NumpyBackend):
    name = "made"
    def open(self, n_threads):
        return Session(n_threads)

BACKEND = Backend()
"""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("known")


@pytest.fixture(autouse=True)
def one_cache(own_home: None, known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found out about this machine and its backends serves all tests here, which saves them repeated trials."""
    monkeypatch.setenv("EDGELM_CACHE", str(known))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model.gguf", "llama")


@pytest.fixture
def register(tmp_path, monkeypatch):
    """Register backends of modules in a folder, for this process and for children."""

    def add(folder: Path, names: Mapping[str, str]) -> None:
        table = {**registry.BACKENDS, **names}
        # children have no patched table, but read this file when they start
        start = tmp_path / "start"
        start.mkdir(exist_ok=True)
        (start / "sitecustomize.py").write_text(f"import edgelm.engine.registry as r\nr.BACKENDS = {table!r}\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.syspath_prepend(str(start))
        monkeypatch.setattr(registry, "BACKENDS", table)

    return add


@pytest.fixture
def made(tmp_path, register):
    """Register the NumPy backend as `made`, with lines of code that run after each of its programs."""

    def make(change: str, name: str = "made") -> None:
        folder = tmp_path / "modules"
        folder.mkdir(exist_ok=True)
        (folder / f"module_{name}.py").write_text(_BACKEND.replace("{change}", change).replace('"made"', f'"{name}"'))
        register(folder, {name: f"module_{name}:BACKEND"})

    return make


def figures(**values) -> Figures:
    defaults = {
        "positions": 100, "mean_kl": 1e-5, "largest_kl": 1e-4, "agreement": 1.0, "largest_gap": 0.0,
        "largest_difference": 0.1, "first_mismatch": None, "perplexity": 20.0,
    }  # fmt: skip
    return Figures(**(defaults | values))


def parity(text: Figures, arithmetic: str = "f32", greedy: tuple[Figures, ...] = ()) -> Parity:
    return Parity("made", "1", "passed", "", False, arithmetic, (), 0, text, greedy, {"linear F32": 1e-12})


# -- figures -------------------------------------------------------------------------------------------


def test_figures_are_those_worked_out_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.5, 0.3]], np.float32)) + 3
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.2, 0.5, 0.3]], np.float32)) - 1
    found = Comparison()
    found.add(reference, other, next_ids=[2])
    assert found.n == 2
    assert found.agreement == 0.5
    assert found.first_mismatch == 0
    assert found.mean_kl == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2, rel=1e-5)
    assert found.largest_kl == pytest.approx(0.25 * math.log(2), rel=1e-5)
    assert found.largest_gap == pytest.approx(math.log(2), rel=1e-5)
    assert found.largest_difference == pytest.approx(4 + math.log(2), rel=1e-5)
    assert found.likelihood.perplexity == pytest.approx(4)
    assert np.exp(log_softmax(reference[0])).sum() == pytest.approx(1)


def test_equal_logits_differ_in_nothing() -> None:
    logits = np.random.default_rng(1).normal(0, 5, (4, 1000)).astype(np.float32)
    found = Comparison()
    found.add(logits, logits)
    assert (found.mean_kl, found.largest_gap, found.agreement, found.first_mismatch) == (0.0, 0.0, 1.0, None)
    assert found.likelihood.perplexity is None


@pytest.mark.parametrize("wrong", [np.full((2, 5), np.nan), np.full((2, 5), np.inf), np.zeros((2, 6))])
def test_logits_that_cannot_be_compared_are_refused(wrong) -> None:
    with pytest.raises(BadLogits):
        Comparison().add(np.zeros((2, 5), np.float32), wrong.astype(np.float32))


@pytest.mark.parametrize(
    ("arithmetic", "values", "said"),
    [
        ("f32", {}, ""),
        ("f32", {"mean_kl": 2e-4}, "mean KL is 0.0002, above 0.0001"),
        ("f32", {"agreement": 0.98}, "top-1 agreement is 98.00%, below 99%"),
        ("int8", {"mean_kl": 2e-4, "agreement": 0.96}, ""),
        ("int8", {"mean_kl": 6e-3}, "above 0.005"),
        ("converted", {"mean_kl": 6e-3, "agreement": 0.9}, ""),
        ("f32", {"mean_kl": float("nan")}, "mean KL is nan"),
    ],
)
def test_each_arithmetic_has_its_tolerance(arithmetic, values, said) -> None:
    judged = parity(figures(**values), arithmetic).judged()
    assert judged.status == ("outside" if said else "passed")
    assert said in judged.reason


def test_single_tokens_are_judged_by_their_mean() -> None:
    greedy = (figures(mean_kl=3e-4, positions=16), figures(mean_kl=0.0, positions=16))
    assert parity(figures(), greedy=greedy).judged().reason == "mean KL of single tokens is 0.00015, above 0.0001"


def test_a_verification_passes_if_something_was_compared_and_nothing_failed() -> None:
    def of(*statuses):
        runs = tuple(Parity("made", "1", status, "", False, "f32", (), 0, None, (), {}) for status in statuses)
        return Verification("m", "t", "numpy", 20.0, 10, 16, 1, None, 1.0, runs)

    assert of("passed", "unavailable", "refused").passed
    assert not of("passed", "failed").passed
    assert not of("passed", "outside").passed
    assert not of("unavailable").passed
    assert not of().passed
    assert "| none |" in of().markdown()


def test_what_is_simulated_is_labelled() -> None:
    one = replace(parity(figures()), simulated=True)
    found = Verification("m", "t", "numpy", 20.0, 10, 16, 1, None, 1.0, (one, replace(one, version="a simulated NPU")))
    assert "| made (1, simulated) |" in found.markdown()
    assert "| made (a simulated NPU) |" in found.markdown()
    assert found.as_dict()["backends"][0]["simulated"] is True


def test_json_holds_no_number_that_is_none() -> None:
    found = Verification("m", "t", "numpy", 20.0, 10, 16, 1, None, 1.0, (parity(figures(mean_kl=float("nan"))),))
    said = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert said["backends"][0]["text"]["mean_kl"] is None
    assert said["tolerances"]["int8"] == {"mean_kl": 5e-3, "agreement": 0.95}
    assert "not a number" in found.markdown()


def test_the_text_is_as_described() -> None:
    text = TEXT.read_text(encoding="utf-8")
    assert 95_000 < len(text.encode()) <= 100_000
    assert text.startswith("Chapter 1\n\nSir Walter Elliot, of Kellynch Hall")
    assert text.isascii()


# -- backends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [name if name in ("llama", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def test_every_backend_that_works_here_agrees_with_the_oracle(tmp_path, architecture) -> None:
    path = tiny_model(tmp_path / "model.gguf", architecture)
    found = edgelm.verify(path, positions=96, context=64, threads=1)  # beyond the sliding windows
    works = [name for name in registry.backend_names() if name != "numpy" and check(name).available]
    if not works:
        pytest.skip("no backend but the oracle works here")
    reasons = {one.backend: one.reason for one in found.backends if one.reason}
    assert found.passed, reasons
    for one in found.backends:
        if one.backend in works and not one.conversions:
            assert one.status == "passed", one.reason
            assert one.text is not None
            assert one.text.positions == 96
            assert one.text.mean_kl <= 1e-4  # without quantized matrices nobody rounds activations
            assert len(one.greedy) == 3
            assert max(one.operations.values(), default=0.0) <= 1e-6, one.operations


def test_the_oracle_agrees_with_itself_and_with_passes_without_window_and_plan(model) -> None:
    found = edgelm.verify(model, backends=["numpy"], positions=30, context=32, threads=1)
    (one,) = found.backends
    assert found.passed
    assert one.text.mean_kl == 0.0
    assert one.text.perplexity == found.oracle_perplexity
    assert [figures.first_mismatch for figures in one.greedy] == [None] * 3
    assert set(one.operations) >= {"embed F32", "linear F32", "rms_norm", "rope", "attend", "gate silu", "add"}
    assert set(one.operations.values()) == {0.0}

    ids = load_tokenizer(open_model(model)).encode(TEXT.read_text(encoding="utf-8"))[:31]
    logits = evaluate(model, ids)
    likelihood = [log_softmax(row)[after] for row, after in zip(logits, ids[1:], strict=False)]
    assert found.oracle_perplexity == pytest.approx(math.exp(-sum(likelihood) / 30), rel=1e-4)


def test_types_are_told_apart(tmp_path) -> None:
    types = {"default": "Q4_K", "ffn_down": "Q6_K", "token_embd": "Q8_0", "attn_v": "Q5_0"}
    path = tiny_model(tmp_path / "model.gguf", "gemma3", types=types)
    errors = errors_of(path, "numpy", range(40, 50), 1)
    assert {kind for kind in errors if kind[:3] in ("lin", "emb")} == {
        "embed Q8_0", "linear Q4_K", "linear Q6_K", "linear Q5_0", "linear Q8_0",
    }  # fmt: skip


def test_layouts_of_weights_and_caches_change_nothing(tmp_path, register) -> None:
    """NumPy behind layouts that it does not know: prepared files, tiles, caches and adopted weights."""
    register(Path(layout_backends.__file__).parent, layout_backends.NAMES)
    path = tiny_model(
        tmp_path / "model.gguf", "gemma3", types={"default": "Q4_1", "ffn_up": "F16", "token_embd": "Q8_0"}
    )
    found = edgelm.verify(path, backends=["cached", "adopting"], positions=70, context=64, threads=1)
    assert found.passed, [one.reason for one in found.backends]
    for one in found.backends:
        assert (one.text.mean_kl, one.greedy_kl, max(one.operations.values())) == (0.0, 0.0, 0.0), one.backend


@pytest.mark.slow
def test_a_folder_whose_weights_are_converted_says_so(tmp_path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama", quantized={"": (4, 64)})
    found = edgelm.verify(folder, positions=64, context=64, threads=1)
    one = next((one for one in found.backends if one.backend == "llamacpp"), None)
    if one is None or one.status == "unavailable":
        pytest.skip("the llamacpp backend does not work here")
    assert (one.arithmetic, one.status) == ("converted", "passed"), one.reason
    assert one.conversions


def test_a_wrong_operation_is_named(model, made) -> None:
    made("if segment.ops[-1].kind == 'rope': outputs[0][:] *= 1.1")
    errors = errors_of(model, "made", range(40, 50), 1)
    assert errors["rope"] == pytest.approx(0.01, rel=1e-3)
    assert errors["linear F32"] == 0.0


def test_logits_that_are_off_lie_outside(model, made) -> None:
    made("if shape.n_tokens == 32: outputs[-1][:] += np.arange(outputs[-1].shape[1], dtype=np.float32) % 7")
    found = edgelm.verify(model, backends=["made"], positions=32, threads=1)
    assert not found.passed
    assert found.backends[0].status == "outside"
    assert "mean KL is" in found.backends[0].reason


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "if shape.n_tokens == 36: os.kill(os.getpid(), signal.SIGSEGV)",
            "its process died (SIGSEGV) (after 64 positions)",
        ),
        ("if shape.n_tokens == 36: raise KeyError('a bug')", "its process ended with exit code 1: KeyError: 'a bug'"),
        ("if shape.n_tokens == 36: outputs[-1][3] = np.nan", "its logits at position 67 are infinite or no numbers"),
    ],
)
def test_a_backend_that_fails_leaves_the_others_their_table(model, made, change, said) -> None:
    made("pass", name="good")
    made(change)
    found = edgelm.verify(model, backends=["made", "numpy"], positions=100, threads=1)
    failed, good = found.backends
    assert failed.status == "failed"
    assert failed.reason.startswith(said)
    assert (good.status, good.text.positions) == ("passed", 100)
    assert not found.passed
    assert "**failed**" in found.markdown()
    assert failed.reason in found.markdown()


def test_a_backend_that_hangs_is_given_up(model, made, monkeypatch) -> None:
    monkeypatch.setattr(side, "PATIENCE_S", 1.0)
    made("time.sleep(60)")
    with pytest.raises(SideFailed, match="it gave no answer within 1 s") as failed:
        Side(do="operations", path=model, backend="made", threads=1, ids=[1, 2, 3])
    assert not failed.value.refused


@pytest.mark.parametrize(("named", "status"), [(True, "failed"), (False, "refused")])
def test_a_refusal_counts_only_for_a_backend_that_was_asked_for(model, made, named, status) -> None:
    made("if shape.n_tokens == 2: raise UnsupportedModel('not this one; try another')")
    run = Run("made", named=named)
    with ExitStack() as stack:
        run.open(stack, {"path": model, "threads": 1, "memory": None, "context": 32})
        run.read([5, 6], [6], np.zeros((2, 8), np.float32), clear=True)
    found = run.result()
    assert (found.status, found.reason, found.text) == (status, "not this one; try another", None)


@pytest.mark.parametrize(("named", "status"), [(True, "failed"), (False, "unavailable")])
def test_a_backend_that_does_not_work_here_is_named_with_the_reason(monkeypatch, named, status) -> None:
    monkeypatch.setattr("edgelm.parity.run.check", lambda name: Availability(False, "no such library"))
    found = Run("mlx", named=named).result()
    assert (found.status, found.reason) == (status, "no such library")


def test_what_is_asked_for_is_checked_first(model, tmp_path) -> None:
    with pytest.raises(UnknownBackend):
        edgelm.verify(model, backends=["onxx"])
    with pytest.raises(ConfigError, match="positions"):
        edgelm.verify(model, positions=0)
    with pytest.raises(ConfigError, match="cannot be read"):
        edgelm.verify(model, text=tmp_path / "missing.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(ConfigError, match="not UTF-8"):
        edgelm.verify(model, text=tmp_path / "bytes")
    (tmp_path / "short").write_text("Hi")
    with pytest.raises(ConfigError, match="tokens"):
        edgelm.verify(model, text=tmp_path / "short")


def test_what_the_oracle_refuses_is_refused(tmp_path) -> None:
    path = tiny_model(tmp_path / "model.gguf", "llama", metadata={"general.architecture": "llamb"})
    with pytest.raises((SideFailed, UnsupportedModel), match="llamb"):
        edgelm.verify(path, positions=16, context=32, threads=1)


def test_a_side_keeps_within_its_budget(model) -> None:
    with pytest.raises(SideFailed, match="budget") as refused:
        Side(do="serve", path=model, backend="numpy", threads=1, memory=1_000_000, context=64)
    assert (refused.value.refused, refused.value.exit_code) == (True, 6)


@pytest.mark.models
@pytest.mark.slow
def test_a_real_model(real_model) -> None:
    found = edgelm.verify(real_model("smollm2-135m-instruct"), positions=512, threads=2)
    assert found.passed, found.markdown()
    assert 5 < found.oracle_perplexity < 100
