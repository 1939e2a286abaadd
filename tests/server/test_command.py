"""`edgelm serve` as a process: what it says, how it stops, and what it refuses."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

COMMAND = [sys.executable, "-m", "edgelm_apps.cli", "serve"]
ENGINE = ["--memory", "300MB", "--backend", "numpy", "--threads", "1", "--context", "128"]


@pytest.fixture
def server(models: dict[str, Path]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    paths = [str(path) for path in models.values()]
    child = subprocess.Popen([*COMMAND, *paths, "--port", "0", *ENGINE], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        line = next(line for line in child.stderr if "http://" in line)
        yield child, line.split()[1].rstrip("/")
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def test_small_answers_are_sent_at_once() -> None:
    from edgelm_apps.server.running import listen

    async def seen() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            found.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(connected, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await found

    assert asyncio.run(seen())


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(server: tuple[subprocess.Popen[str], str], by: signal.Signals) -> None:
    child, url = server
    told = httpx.get(f"{url}/health").json()
    assert told == {"status": "ok", "model": "first", "busy": False, "waiting": 0}
    body = {"messages": [{"role": "user", "content": "the cat"}], "max_tokens": 3}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    assert answer["model"] == "first"
    assert answer["edgelm"]["peak_bytes"] <= answer["edgelm"]["budget_bytes"] == 300_000_000
    child.send_signal(by)
    assert child.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--api-key", " "], 2, "the API key is empty"),
        (["--overflow", "trim"], 2, "keeps no conversation"),
        (["--memory", "1MB"], 6, "too small"),
        (["--host", "203.0.113.1"], 2, "cannot listen on 203.0.113.1:0"),
    ],
)
def test_mistakes_are_one_sentence(models: dict[str, Path], options: list[str], code: int, said: str) -> None:
    command = [*COMMAND, str(models["first"]), "--port", "0", *ENGINE, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(models: dict[str, Path]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        command = [*COMMAND, str(models["first"]), "--port", port, *ENGINE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "choose another --port" in done.stderr


def test_without_the_extra_it_says_what_to_install(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", name='uvicorn')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from edgelm_apps.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(models["first"]), *ENGINE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'edgelm[serve]'" in done.stderr
