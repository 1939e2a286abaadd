"""Eight clients at one server inside a budget: do all get on, how fast together, does memory stay flat, who is stopped.

    python bench/server.py [--minutes 10] [--clients 8] [--memory 150MB]

One client alone comes first, with the same conversations, for a tenth of the time. Clients hold chats of three turns; a
429 is waited out as it says. Then answers are left in the middle, one after the other, and the time until the engine is
free is compared with a pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import common
import httpx

QUESTIONS = (
    "Name a fruit and say where it grows.",
    "Why is the sky blue?",
    "Write two sentences about a lighthouse.",
)
MAX_TOKENS, LEFT = 48, 20


class Client:
    """One client: what it got, and how long its first bytes took."""

    def __init__(self, url: str, name: str, until: float) -> None:
        self._http = httpx.Client(base_url=url, timeout=600)
        self._name, self._until = name, until
        self.turns, self.tokens, self.statuses, self.first_s = 0, 0, Counter[int](), []

    def run(self) -> None:
        while time.monotonic() < self._until:
            messages: list[dict[str, str]] = []
            for question in QUESTIONS:
                messages.append({"role": "user", "content": f"{question} ({self._name})"})
                answer = self._ask(messages)
                if answer is None:
                    break
                messages.append({"role": "assistant", "content": answer})

    def _ask(self, messages: list[dict[str, str]]) -> str | None:
        body = {"messages": messages, "max_tokens": MAX_TOKENS, "stream": True, "user": self._name}
        body["stream_options"] = {"include_usage": True}
        while time.monotonic() < self._until:
            began = time.monotonic()
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                self.statuses[response.status_code] += 1
                if response.status_code == 429:
                    wait_s = float(response.headers["Retry-After"])
                else:
                    return self._read(response, began)
            time.sleep(wait_s)
        return None

    def _read(self, response: httpx.Response, began: float) -> str | None:
        text, first = "", None
        for line in response.iter_lines():
            first = first or time.monotonic() - began
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                self.statuses[-1] += 1
                return None
            for choice in event["choices"]:
                text += choice["delta"].get("content", "")
            if event.get("usage"):
                self.tokens += event["usage"]["completion_tokens"]
                self.turns += 1
        self.first_s.append(first or 0.0)
        return text


def together(url: str, names: list[str], seconds: float) -> tuple[list[Client], float]:
    """Let clients ask for so long; return them, and the tokens a second of all."""
    began = time.monotonic()
    clients = [Client(url, name, began + seconds) for name in names]
    threads = [threading.Thread(target=client.run) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return clients, sum(client.tokens for client in clients) / (time.monotonic() - began)


def leave(url: str) -> list[float]:
    """Leave answers in the middle; return the seconds until the engine was free, each time."""
    found = []
    with httpx.Client(base_url=url, timeout=60) as http:
        body = {"messages": [{"role": "user", "content": QUESTIONS[1]}], "max_tokens": 400, "stream": True}
        for _ in range(LEFT):
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data: {"))
                for _ in range(6):
                    next(lines)
            left = time.monotonic()
            while http.get("/health").json()["busy"]:
                pass
            found.append(time.monotonic() - left)
    return found


class Memory(threading.Thread):
    """Resident bytes of a process, every half second, with the time."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self._stop = Path(f"/proc/{pid}/status"), threading.Event()
        self.seen: list[tuple[float, int]] = []

    def run(self) -> None:
        while not self._stop.wait(0.5):
            self.seen.append((time.monotonic(), self.bytes("VmRSS")))

    def bytes(self, name: str) -> int:
        found = next(line for line in self._status.read_text().splitlines() if line.startswith(f"{name}:"))
        return int(found.split()[1]) * 1024

    def slope(self) -> float:
        """Stop, and return by how many bytes memory grew over the time, along the straight line that fits best."""
        self._stop.set()
        middle = sum(when for when, _ in self.seen) / len(self.seen)
        spread = sum((when - middle) ** 2 for when, _ in self.seen)
        rate = sum((when - middle) * n_bytes for when, n_bytes in self.seen) / spread
        return rate * (self.seen[-1][0] - self.seen[0][0])


def main() -> None:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--memory", default="150MB")
    parser.add_argument("--backend")
    given = parser.parse_args()
    conditions = {"threads": given.threads, "budget": given.memory, "minutes": given.minutes, "clients": given.clients}
    report = common.Report("server", conditions)
    for name in given.models[:1]:
        command = [sys.executable, "-m", "edgelm_apps.cli", "serve", str(common.find_model(name)), "--port", "0"]
        command += ["--memory", given.memory, "--threads", str(given.threads), "--context", "1024"]
        command += ["--backend", given.backend] if given.backend else []
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert server.stderr is not None
            url = next(line.split()[1] for line in server.stderr if "http://" in line).rstrip("/")
            together(url, ["warm"], 5.0)
            _, alone_tps = together(url, ["alone"], 6.0 * given.minutes)
            memory = Memory(server.pid)
            memory.start()
            clients, tps = together(url, [f"client {n}" for n in range(given.clients)], 60.0 * given.minutes)
            grown = memory.slope()
            left = leave(url)
            status = httpx.get(f"{url}/v1/status").json()
            statuses = sum((client.statuses for client in clients), Counter[int]())
            report.add(
                "clients at one server",
                model=name,
                backend=status["backend"],
                **{
                    "streamed MB": common.mb(status["streamed_bytes"]),
                    "alone tok/s": round(alone_tps, 1),
                    "together tok/s": round(tps, 1),
                    "ratio": round(tps / alone_tps, 3),
                    "turns": sum(client.turns for client in clients),
                    "fewest of a client": min(client.turns for client in clients),
                    "statuses": {str(key): n for key, n in sorted(statuses.items())},
                    "longest to a first byte s": round(max(max(client.first_s) for client in clients), 2),
                    "memory grew MB": round(grown / 1e6, 2),
                    "peak MB": common.mb(memory.bytes("VmHWM")),
                    "left: free after ms": round(1e3 * common.middle(left), 1),
                    "at the most ms": round(1e3 * max(left), 1),
                    "a token ms": round(1e3 / status["usage"]["decode_tps"], 1),
                },
            )
        finally:
            server.terminate()
            server.wait(30)
    report.finish()


if __name__ == "__main__":
    main()
