"""What the server promises beside answers: who may ask, how much, who is stopped, and what lives meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import PATIENCE_S, Running, running

from edgelm.engine.forward import Engine

CAT = [{"role": "user", "content": "the cat and the dog"}]
ASK: dict[str, Any] = {"model": "first", "messages": CAT}


def client(server: Running, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=PATIENCE_S, **options)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def idle(asking: httpx.Client) -> bool:
    told = asking.get("/health").json()
    return not told["busy"] and not told["waiting"]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let every pass take 50 ms; return when each began."""
    began: list[float] = []
    compute = Engine._pass

    def slowly(self: Engine, *given: Any, **named: Any) -> None:
        began.append(time.monotonic())
        time.sleep(0.05)
        compute(self, *given, **named)

    monkeypatch.setattr(Engine, "_pass", slowly)
    return began


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "no JSON"),
        (b"[]", 400, "Expected `object`"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 0}', 400, "n: Expected"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 3}', 400, "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}', 400, "logprobs"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "image_url"),
        (b'{"messages": [{"role": "user", "content": "x"}], "regex": "("}', 400, "regex"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tool_choice": "required"}', 400, "needs tools"),
        (b'{"model": "third", "messages": [{"role": "user", "content": "x"}]}', 404, "first, second"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 5_000_000 + b'"}]}', 413, "4000000 bytes"),
        (b'{"tools":' * 100_000, 400, ""),
        (b"\xff", 400, "JSON"),
    ],
)
def test_bad_requests_get_one_sentence(server: Running, body: bytes, status: int, said: str) -> None:
    with client(server) as asking:
        answer = asking.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == status
        error = answer.json()["error"]
        assert said in error["message"]
        assert "Traceback" not in error["message"]
        assert set(error) >= {"message", "type", "param", "code"}


def test_chunked_bodies_are_counted_too(server: Running) -> None:
    def body() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 100_000

    with client(server) as asking:
        answer = asking.post("/v1/chat/completions", content=body(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_other_types_and_routes(server: Running) -> None:
    with client(server) as asking:
        assert asking.post("/v1/chat/completions", data={"a": "b"}).status_code == 415
        assert asking.get("/v1/chat/completions").status_code == 405
        assert asking.get("/nothing").json()["error"]["code"] == "not_found"
        assert asking.get("/page/../app.py").status_code == 404


def test_pages_of_others_are_refused_unless_allowed(models: dict[str, Path]) -> None:
    with running(models, origins=("https://mine.example",)) as server, client(server) as asking:
        theirs = asking.post("/v1/chat/completions", json=ASK, headers={"Origin": "https://theirs.example"})
        assert theirs.status_code == 403
        assert "--allow-origin https://theirs.example" in theirs.json()["error"]["message"]
        mine = asking.options(
            "/v1/chat/completions",
            headers={"Origin": "https://mine.example", "Access-Control-Request-Method": "POST"},
        )
        assert mine.headers["access-control-allow-origin"] == "https://mine.example"
        assert asking.get("/v1/models", headers={"Origin": server.url}).status_code == 200
        for strange in ("null", "http://[", "://", server.url.partition("//")[2]):
            assert asking.get("/v1/models", headers={"Origin": strange}).status_code == 403


def test_names_that_lead_here_by_surprise_are_refused(models: dict[str, Path]) -> None:
    origins = ("https://mine.example:8443",)
    with running(models, names=("localhost", "mypi"), origins=origins) as server, client(server) as asking:
        for host in ("rebound.example", "rebound.example:8080", "127.0.0.1.rebound.example", "[rebound]"):
            refused = asking.get("/v1/models", headers={"Host": host})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        for host in ("localhost", "LocalHost:80", "mypi:8080", "mine.example:8443", "192.168.1.7", "[::1]:8080"):
            assert asking.get("/v1/models", headers={"Host": host}).status_code == 200
    with running(models, key="secret") as server, client(server) as asking:  # strangers' pages have no key
        ours = {"Host": "rebound.example", "Authorization": "Bearer secret"}
        assert asking.get("/v1/models", headers=ours).status_code == 200


def test_a_key_is_asked_for_but_not_for_the_page(models: dict[str, Path]) -> None:
    with running(models, key="secret") as server, client(server) as asking:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert asking.get("/v1/models", headers=headers).status_code == 401
        assert asking.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert [asking.get(path).status_code for path in ("/health", "/", "/page/app.js")] == [200] * 3
        assert asking.get("/metrics").status_code == 401


def test_whoever_leaves_during_an_answer_stops_it_within_one_pass(models: dict[str, Path], slow: list[float]) -> None:
    with running(models) as server, client(server) as asking:
        asking.post("/v1/chat/completions", json=ASK | {"max_tokens": 1})
        with asking.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as events:
            lines = (line for line in events.iter_lines() if line.startswith("data"))
            for _ in range(4):
                next(lines)
        left = time.monotonic()
        eventually(lambda: idle(asking))
        assert sum(began > left for began in slow) <= 2  # one may begin before the socket tells
        assert "edgelm_cancelled_total 1.0" in asking.get("/metrics").text


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_leaves_during_the_prompt_stops_it(models: dict[str, Path], slow: list[float], stream: bool) -> None:
    with running(models, engine={"context": 4096}) as server, client(server) as asking:
        asking.post("/v1/chat/completions", json=ASK | {"max_tokens": 1})
        n_before = len(slow)
        body = {"model": "first", "stream": stream, "messages": [{"role": "user", "content": "the cat " * 1200}]}
        with pytest.raises(httpx.ReadTimeout):
            asking.post("/v1/chat/completions", json=body, timeout=0.08)
        eventually(lambda: idle(asking))
        assert 0 < len(slow) - n_before < 3640 // 512


def test_a_stream_that_waits_begins_before_the_first_keep_alive(models: dict[str, Path], slow: list[float]) -> None:
    with running(models, keep_alive_s=60.0) as server, client(server) as asking, client(server) as other:
        body = ASK | {"stream": True, "max_tokens": 400, "speculate": False}
        with asking.stream("POST", "/v1/chat/completions", json=body) as first:
            lines = first.iter_lines()  # whose end is that of the connection
            next(lines)
            with other.stream("POST", "/v1/chat/completions", json=body, timeout=30) as waiting:
                assert next(waiting.iter_lines()).startswith(": ")


def test_a_full_queue_says_when_to_come_back_and_streams_live_meanwhile(
    models: dict[str, Path], slow: list[float]
) -> None:
    with running(models, queue=1, keep_alive_s=0.2) as server, client(server) as asking:
        first: list[str] = []
        done = threading.Event()

        def read() -> None:
            with (
                client(server) as mine,
                mine.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True}) as got,
            ):
                for line in got.iter_lines():
                    first.append(line)
                    if done.is_set():
                        return

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: first)
        with asking.stream("POST", "/v1/chat/completions", json=ASK | {"stream": True, "max_tokens": 2}) as waiting:
            began = time.monotonic()
            lines = waiting.iter_lines()
            assert next(lines).startswith(": ")  # a comment, long before the first token
            assert time.monotonic() - began < 2.0
            with client(server) as third:
                refused = third.post("/v1/chat/completions", json=ASK)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            done.set()
            rest = [line for line in lines if line.startswith("data")]
        reader.join(PATIENCE_S)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_a_model_that_does_not_fit_is_told_and_the_next_one_is_served(models: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))
    with running(models | {"broken": broken}) as server, client(server) as asking:
        answer = asking.post("/v1/chat/completions", json=ASK | {"model": "broken"})
        assert answer.status_code == 500
        assert "broken.gguf" in answer.json()["error"]["message"]
        assert asking.post("/v1/chat/completions", json=ASK | {"max_tokens": 1}).status_code == 200


def test_the_budget_is_changed_while_it_runs(server: Running) -> None:
    with client(server) as asking:
        asking.post("/v1/chat/completions", json=ASK | {"max_tokens": 1})
        assert asking.post("/v1/budget", json={"memory": "1GB"}).json()["budget_bytes"] == 1_000_000_000
        refused = asking.post("/v1/budget", json={"memory": "1MB"})
        assert refused.status_code == 400
        assert "too small" in refused.json()["error"]["message"]
        assert asking.post("/v1/budget", json={"memory": "2GB"}).json()["budget_bytes"] == 2_000_000_000


def read_stream(server: Running, n_tokens: int, told: list[str]) -> None:
    """Add the events of a streamed answer to `told`, as they come."""
    asked = ASK | {"stream": True, "max_tokens": n_tokens}
    with client(server) as asking, asking.stream("POST", "/v1/chat/completions", json=asked) as got:
        told.extend(line for line in got.iter_lines() if line.startswith("data"))


def test_stopping_ends_streams_in_good_order(models: dict[str, Path], slow: list[float]) -> None:
    seen: list[str] = []
    with running(models) as server:
        reader = threading.Thread(target=read_stream, args=(server, 20, seen))
        reader.start()
        eventually(lambda: slow)
    reader.join(PATIENCE_S)
    assert seen[-1] == "data: [DONE]"
    assert server.pool.loaded is None


def test_an_answer_that_takes_too_long_to_stop_for_ends_with_an_error(
    models: dict[str, Path], slow: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelm_apps.server.running import Listening

    monkeypatch.setattr(Listening, "grace_s", 0.1)
    told: list[str] = []
    waited: list[httpx.Response] = []
    with running(models) as server:

        def wait() -> None:
            with client(server) as asking:
                waited.append(asking.post("/v1/chat/completions", json=ASK | {"max_tokens": 400}))

        asked = [threading.Thread(target=read_stream, args=(server, 400, told)), threading.Thread(target=wait)]
        asked[0].start()
        eventually(lambda: slow)
        asked[1].start()
        with client(server) as asking:
            eventually(lambda: asking.get("/health").json()["waiting"] == 1)
    for one in asked:
        one.join(PATIENCE_S)
    assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "server_stopping"
    assert waited[0].status_code == 503
    assert "the server stops" in waited[0].json()["error"]["message"]


def test_whoever_comes_back_goes_on_from_there(models: dict[str, Path]) -> None:
    def ask(asking: httpx.Client, text: str) -> tuple[str, int]:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8}
        told = asking.post("/v1/chat/completions", json=body).json()
        cached = told["usage"]["prompt_tokens_details"]["cached_tokens"]
        return told["choices"][0]["message"]["content"], cached

    one, other = "the cat " * 40, "and the dog " * 40
    with running(models, shelf_bytes=10_000_000) as server, client(server) as asking:
        first, cached = ask(asking, one)
        assert cached == 0
        ask(asking, other)
        again, cached = ask(asking, one)
        assert again == first
        assert cached > 120
        assert ask(asking, other)[1] > 120
    with running(models, shelf_bytes=1) as server, client(server) as asking:  # room for none
        ask(asking, one)
        ask(asking, other)
        again, cached = ask(asking, one)
        assert again == first
        assert cached < 20
