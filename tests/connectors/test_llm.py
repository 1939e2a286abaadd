"""The plug-in of `llm`, as its own command line and its Python interface call it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.testing import tiny_model
from edgelm.testing.tiny_encoder import ENCODERS, tiny_encoder
from edgelm_apps import holding

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("-o", "memory", "2GB", "-o", "backend", "numpy", "-o", "threads", "1", "-o", "context", "512")
ENGINE = {"memory": "2GB", "backend": "numpy", "threads": 1, "context": 512}
CALL = r'\{"name": "tell_time", "arguments": \{"zone": "(UTC|CET)"\}\}'


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, with a user's folder of its own and the plug-in registered."""
    llm = pytest.importorskip("llm")
    from edgelm_apps import llm_plugin

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "llm"))
    llm.load_plugins()
    if not llm.pm.is_registered(llm_plugin):  # edgelm is not installed, but found on the path
        from llm.cli import cli

        llm.pm.register(llm_plugin, "edgelm")
        llm_plugin.register_commands(cli)
    return llm


@pytest.fixture
def command(llm: Any, models: list[Path]) -> Callable[..., Any]:
    """Run one command line of `llm`; the tiny models are added as tiny0 and tiny1."""
    from click.testing import CliRunner
    from llm.cli import cli

    def run(*argv: str, code: int = 0) -> Any:
        result = CliRunner().invoke(cli, argv, catch_exceptions=False, env={"NO_COLOR": "1"})
        assert result.exit_code == code, result.output
        return result

    for model in models:
        run("edgelm", "add", str(model))
    return run


def asked(result: Any) -> str:
    return str(result.stdout).rstrip("\n")


def test_models_are_listed_with_their_options(command: Callable[..., Any]) -> None:
    shown = command("models", "--options", "-q", "edgelm/").stdout
    assert "edgelm/smollm2-135m-instruct" in shown  # of the catalogue
    assert "edgelm/tiny1" in shown
    assert "Budget of the whole process" in shown
    assert "schemas" in shown
    assert "async" in shown


def test_an_answer_streams_and_is_logged_with_its_tokens(command: Callable[..., Any]) -> None:
    first = command("-m", "edgelm/tiny0", "the cat", *OPTIONS, "-o", "max_tokens", "8", "-u")
    assert "8 output" in first.stderr
    text = asked(first)
    assert text
    assert asked(command("-m", "edgelm/tiny0", "the cat", *OPTIONS, "-o", "max_tokens", "8", "--no-stream")) == text
    assert asked(command("-m", "edgelm/tiny0", "the cat", *OPTIONS, "-o", "max_tokens", "8", "--async")) == text
    (logged,) = json.loads(command("logs", "-n", "1", "--json").stdout)
    assert logged["output_tokens"] == 8
    assert logged["response_json"]["finish_reason"] == "length"
    assert logged["response_json"]["budget_bytes"] == 2_000_000_000


def test_a_conversation_goes_on_and_its_cache_is_kept(command: Callable[..., Any]) -> None:
    command("-m", "edgelm/tiny0", "the cat", *OPTIONS, "-o", "max_tokens", "8")
    for _ in range(2):
        holding.let_go()  # as the end of a process does
        command("-c", "and the dog", *OPTIONS, "-o", "max_tokens", "8")
    (logged,) = json.loads(command("logs", "-n", "1", "--json").stdout)
    assert json.loads(logged["token_details"])["cached_tokens"] > logged["input_tokens"] // 2


def test_schemas_and_patterns(command: Callable[..., Any]) -> None:
    result = command("-m", "edgelm/tiny0", "the cat", *OPTIONS, "--schema", "legs int", "-o", "max_tokens", "40")
    answer = json.loads(result.stdout)
    assert list(answer) == ["legs"]
    assert isinstance(answer["legs"], int)
    assert asked(command("-m", "edgelm/tiny0", "the cat", *OPTIONS, "-o", "regex", "(yes|no)!")) in ("yes!", "no!")


def test_tools_are_called_and_their_results_read(llm: Any, models: list[Path]) -> None:
    called = []

    def tell_time(zone: str) -> str:
        """Tell the time."""
        called.append(zone)
        return "noon"

    from edgelm_apps.llm_plugin import EdgeLM

    model = EdgeLM("tiny0", str(models[0]))
    options = {**ENGINE, "regex": CALL, "max_tokens": 80}
    chain = model.chain("the cat", tools=[tell_time], options=options)
    responses = chain.responses()
    first = next(responses)
    assert first.text() == ""
    (call,) = first.tool_calls()
    second = next(responses)
    second.text()
    assert called == [call.arguments["zone"]]
    assert [message.role for message in second.prompt.messages] == ["user", "assistant", "tool"]
    assert second.usage().details["cached_tokens"] >= first.usage().input


def test_a_template_that_leaves_tools_out_is_warned_of(llm: Any, tmp_path: Path) -> None:
    from edgelm_apps.llm_plugin import EdgeLM

    template = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    model = EdgeLM("bare", str(tiny_model(tmp_path / "bare.gguf", "llama", metadata=template)))
    with pytest.warns(edgelm.ToolsIgnored, match="leaves tools out"):
        model.prompt("x", tools=[llm.Tool("now", "Tell the time.")], max_tokens=2, **ENGINE).text()


def test_async_answers_of_one_model_queue(llm: Any, models: list[Path]) -> None:
    from edgelm_apps.llm_plugin import AsyncEdgeLM, EdgeLM

    async def main() -> list[str]:
        model = AsyncEdgeLM("tiny0", str(models[0]))
        return await asyncio.gather(*(model.prompt("the cat", max_tokens=8, **ENGINE).text() for _ in range(3)))

    expected = EdgeLM("tiny0", str(models[0])).prompt("the cat", max_tokens=8, **ENGINE).text()
    assert asyncio.run(main()) == [expected] * 3


def test_mistakes_are_sentences(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_RAISE_ERRORS", raising=False)
    for option, said in (
        (("memory", "3MB"), "Error: budget 3 MB is too small"),
        (("backend", "onxx"), "Error: backend 'onxx' is not available"),
        (("max_tokens", "0"), "Error: max_tokens must be at least 1"),
        (("nonsense", "1"), "Extra inputs are not permitted"),
    ):
        assert said in command("-m", "edgelm/tiny0", "x", *OPTIONS, "-o", *option, code=1).stderr
    (tmp_path / "x.gguf").write_bytes(b"GIF89a")
    assert "not a GGUF model" in command("edgelm", "add", str(tmp_path / "x.gguf"), code=1).stderr
    assert "(added: tiny0, tiny1)" in command("edgelm", "remove", "tiny2", code=1).stderr


def test_added_files_are_forgotten_again_and_a_damaged_list_is_told(command: Callable[..., Any], llm: Any) -> None:
    command("edgelm", "remove", "edgelm/tiny1")
    shown = command("models", "-q", "edgelm/tiny").stdout
    assert "tiny0" in shown
    assert "tiny1" not in shown
    (llm.user_dir() / "edgelm-models.json").write_text("{")
    assert "its models are left out" in command("models", "-q", "edgelm/").stderr


def test_embeddings(command: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelm_apps.llm_plugin import EMBEDDING

    assert sorted(EMBEDDING) == sorted(ENCODERS)
    take, engine = holding.take, {**ENGINE, "context": 128}
    monkeypatch.setattr(holding, "take", lambda name, _: take(name, engine))  # to try every backend takes its time
    command("edgelm", "add", str(tiny_encoder(tmp_path / "tiny.gguf", "bert")), "vectors")
    assert "edgelm/vectors" in command("embed-models").stdout
    vector = json.loads(command("embed", "-m", "edgelm/vectors", "-c", "the cat").stdout)
    assert sum(x * x for x in vector) == pytest.approx(1)
    assert "edgelm/vectors" not in command("models", "-q", "edgelm/").stdout


def test_an_llm_without_conversations_is_told_to_be_updated(
    llm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgelm_apps import llm_plugin

    monkeypatch.setitem(sys.modules, "llm.parts", None)
    llm_plugin.register_models(lambda *_: pytest.fail("a model was registered"))
    assert "need llm 0.32 or newer" in capsys.readouterr().err


def test_starting_llm_loads_no_engine(llm: Any) -> None:
    code = (
        "import sys, llm, llm.default_plugins.openai_models; before = set(sys.modules)\n"
        "from edgelm_apps import llm_plugin; llm_plugin.register_models(lambda *_: None); "
        "print(*(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {name for name in loaded if not name.startswith("edgelm")} - sys.stdlib_module_names == set()
    assert not {name for name in loaded if name.startswith(("edgelm.engine", "edgelm.model"))}


def test_the_entry_point_is_this_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["llm"] == {"edgelm": "edgelm_apps.llm_plugin"}


def test_ctrl_c_stops_an_answer(llm: Any, models: list[Path], tmp_path: Path) -> None:
    code = (
        "from edgelm_apps.llm_plugin import EdgeLM; import sys\n"
        f"model = EdgeLM('tiny', {str(models[0])!r})\n"
        "for text in model.prompt('x', regex='[ab]{400}', backend='numpy', memory='2GB', threads=1, context=512):\n"
        "    print(text, end='', flush=True)"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error
    assert len(rest) < 399
