"""`edgelm verify` on the command line: what is measured, how it is shown, and the exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgelm
from edgelm.parity.report import Figures, Parity, Verification
from edgelm.testing import tiny_model

FIGURES = Figures(40, 2e-3, 0.1, 0.975, 0.25, 0.5, 3, 21.5)


def verification(status: str) -> Verification:
    one = Parity("llamacpp", "ggml 1", status, "", False, "int8", (), 0, FIGURES, (FIGURES,), {"linear Q4_1": 3e-4})  # type: ignore[arg-type]
    other = Parity("mlx", "", "unavailable", "mlx is not installed", False, "", (), 0, None, (), {})
    return Verification("m.gguf", "persuasion.txt", "numpy", 21.25, 40, 64, 2, None, 3.0, (one, other))


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(tiny_model(tmp_path / "tiny.gguf", "llama"))


@pytest.fixture
def asked(monkeypatch):
    """Keep what the engine was asked for; the answer is made up."""
    calls = []

    def verify(path, **options):
        options.pop("progress")(1, 2)
        calls.append(options)
        return verification("outside" if "llamacpp" in (options["backends"] or ()) else "passed")

    monkeypatch.setitem(vars(edgelm), "verify", verify)
    return calls


def test_a_real_verification(edgelm_command, model):
    result = edgelm_command("verify", model, "--backend", "numpy", "--positions", "20", "--context", "32", "--json")
    found = result.json()
    assert (result.code, result.err, found["passed"]) == (0, "", True)
    assert found["backends"][0]["text"]["positions"] == found["positions"] == 20
    assert found["backends"][0]["text"]["mean_kl"] == 0.0


def test_tables_for_people(edgelm_command, model, asked):
    result = edgelm_command("verify", model)
    assert result.code == 0
    assert result.err == ""  # no bar where there is no terminal
    row = (
        "| llamacpp (ggml 1) | passed | int8 | 0.002 (≤ 0.005) | 0.1 | 97.50% (≥ 95%) | 0.250 | 21.5 | 0.002 | "
        "3 same, then a gap of 0.25 |"
    )
    assert row in result.out
    assert "| mlx | **unavailable** |" in result.out
    assert "- mlx: mlx is not installed" in result.out
    assert "| linear Q4_1 | 0.0003 |" in result.out
    assert "Perplexity to the oracle: 21.2500." in result.out


@pytest.mark.parametrize(
    ("options", "positions", "text"),
    [
        ((), 2000, None),
        (("--positions", "5"), 5, None),
        (("--perplexity",), None, None),
        (("--perplexity", "novel.txt"), None, Path("novel.txt")),
        (("--perplexity", "novel.txt", "--positions", "7"), 7, Path("novel.txt")),
    ],
)
def test_what_is_read(edgelm_command, model, asked, options, positions, text):
    assert edgelm_command("verify", model, *options).code == 0
    assert (asked[0]["positions"], asked[0]["text"]) == (positions, text)


def test_what_lies_outside_has_an_exit_code(edgelm_command, model, asked):
    result = edgelm_command("verify", model, "--backend", "numpy", "--backend", "llamacpp", "--memory", "300MB")
    assert result.code == 11
    assert "**outside**" in result.out
    assert asked[0]["backends"] == ("numpy", "llamacpp")
    assert asked[0]["memory"] == "300MB"


def test_a_mistake_is_one_sentence(edgelm_command, model):
    result = edgelm_command("verify", model, "--backend", "onxx")
    assert result.code == 7
    assert "onxx" in result.err
    assert edgelm_command("verify", model, "--perplexity", "missing.txt").code == 2
    assert edgelm_command("verify", model, "--memory", "1MB", "--positions", "5").code == 6
