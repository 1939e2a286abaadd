"""The command line on a folder of onnxruntime-genai: every command that takes a model, and the exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgelm.testing.tiny_genai import tiny_genai
from edgelm_apps.cli import main

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_genai(tmp_path / "model", quantized=True, n_layers=1, n_context=512)


@pytest.fixture
def prompt(tmp_path: Path) -> list[str]:
    """Return the option that gives a prompt without standard input."""
    path = tmp_path / "prompt.txt"
    path.write_text("the sand")
    return ["--prompt-file", str(path)]


def test_run_answers_and_counts(folder: Path, prompt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["run", str(folder), *prompt, "--memory", "600MB", "--max-tokens", "4", "--ignore-eos", "--json"]
    assert main(argv) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["backend"], answer["completion_tokens"], answer["finish_reason"]) == ("onnx", 4, "length")
    assert answer["stats"]["peak_bytes"] > 0
    assert answer["stats"]["bytes_streamed"] == 0


def test_what_is_decided_is_said(folder: Path, prompt: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(folder), *prompt, "--memory", "600MB", "--max-tokens", "1", "--raw", "--ignore-eos"]) == 0
    said = capsys.readouterr().err
    assert "onnx backend" in said
    assert "resident only" in said


def test_plan_and_show(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--memory", "600MB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["streamed_bytes_per_pass"] == 0
    assert plan["context"] == 512
    assert main(["plan", str(folder), "--memory", "600MB"]) == 0
    assert "nothing is streamed" in capsys.readouterr().out
    assert main(["show", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {entry["type"] for entry in shown["tensor_types"]} >= {"uint8", "float32"}
    assert "im_start" in shown["template"]


def test_bench_measures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), "-p", "16", "-n", "4", "-r", "1", "--memory", "600MB"]) == 0
    assert "onnx" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "options", "code", "words"),
    [
        ("", ["--memory", "30MB"], 6, "this model needs"),
        ("", ["--backend", "numpy"], 7, "one ONNX graph"),
        ("", ["--context", "513"], 2, "more than the 512 tokens"),
        ("model.onnx", [], 3, "no such file"),
        ("model.onnx.data", [], 4, "not beside it"),
        ("tokenizer.json", [], 5, "tokenizer.json"),
    ],
)
def test_exit_codes(
    spoil: str,
    options: list[str],
    code: int,
    words: str,
    folder: Path,
    prompt: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    if spoil:
        (folder / spoil).unlink()
    assert main(["run", str(folder), *prompt, "--memory", "600MB", *options]) == code
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_pipeline_is_unsupported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["pipeline"] = []
    path.write_text(json.dumps(config))
    assert main(["show", str(folder)]) == 5
    assert "pipeline" in capsys.readouterr().err
