"""Hub names against a local server that imitates a hub's endpoints; the client library is the real one."""

from __future__ import annotations

import hashlib
import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from edgelm import load
from edgelm.errors import ConfigError
from edgelm.testing import tiny_folder
from edgelm_apps.cli import main
from edgelm_models import hub_blob
from edgelm_models.hub import HubName, choose_files, parse_hub_name, quantization_of
from edgelm_models.pull import locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = os.urandom(3_000_000)
SHARDS = [os.urandom(2000), os.urandom(1000)]


class Hub(ThreadingHTTPServer):
    """One repository, `org/tiny-GGUF`: large files are answered with a redirect, as hubs do."""

    files = {  # noqa: RUF012 - shared by all requests on purpose
        "tiny-Q4_K_M.gguf": MODEL,
        "tiny-Q8_0-00001-of-00002.gguf": SHARDS[0],
        "tiny-Q8_0-00002-of-00002.gguf": SHARDS[1],
        "mmproj-tiny-F16.gguf": b"not a language model",
        "README.md": b"hello",
    }

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.cut_after_bytes: int | None = None
        self.ranges = True
        self.promised: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny-GGUF"):
            self._send(200, json.dumps(self._info()).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith("/org/tiny-GGUF/resolve/") and (name := path.rpartition("/")[2]) in Hub.files:
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{self._sha256(name)}"',
                "X-Linked-Size": str(len(Hub.files[name])),
                "Location": f"/cdn/{name}",
            }
            self._send(302, b"", headers, body)
        elif path.startswith("/cdn/"):
            self._send_file(path.rpartition("/")[2], body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _sha256(self, name: str) -> str:
        return self.server.promised.get(name) or hashlib.sha256(Hub.files[name]).hexdigest()

    def _info(self) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name, "size": len(data), "blobId": "0" * 40,
                "lfs": {"sha256": self._sha256(name), "size": len(data), "pointerSize": 134},
            }
            for name, data in Hub.files.items()
        ]  # fmt: skip
        return {
            "_id": "1", "id": "org/tiny-GGUF", "modelId": "org/tiny-GGUF", "sha": COMMIT, "siblings": siblings,
            "tags": [], "private": False, "downloads": 0, "cardData": {"license": "mit"},
            "gguf": {"context_length": 4096},
        }  # fmt: skip

    def _send_file(self, name: str, body: bool) -> None:
        data = Hub.files[name]
        wanted = self.headers.get("Range") if self.server.ranges else None
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        headers = {"ETag": f'"{self._sha256(name)}"', "X-Repo-Commit": COMMIT}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.server.cut_after_bytes
        self._send(206 if wanted else 200, data[start:], headers, body, cut)

    def _send(
        self, code: int, data: bytes, headers: dict[str, str], body: bool, cut_after_bytes: int | None = None
    ) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut_after_bytes])
            if cut_after_bytes is not None and len(data) > cut_after_bytes:
                self.close_connection = True


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    # What HF_ENDPOINT and HF_HOME set; the library reads them only once, when it is imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hf" / "hub"))
    monkeypatch.setattr(hub_blob, "_PAUSE_S", 0.0)
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def edgelm(*argv: str) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(argv))
    return Done(code, out.getvalue(), err.getvalue())


def pulled(*argv: str) -> dict[str, Any]:
    done = edgelm("pull", "--json", *argv)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def bodies(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET /cdn/")]


def start_of(request: str) -> int:
    return int(request.rpartition("bytes=")[2].rstrip("-")) if "bytes=" in request else 0


def test_pull_by_quantization_uses_the_hub_cache_layout(hub, home):
    model = pulled("org/tiny-GGUF:q4_k_m")
    file = Path(model["file"])
    assert file.read_bytes() == MODEL
    assert file.parent == home / "hf" / "hub" / "models--org--tiny-GGUF" / "snapshots" / COMMIT
    assert file.resolve().name == hashlib.sha256(MODEL).hexdigest()
    assert (home / "hf" / "hub" / "models--org--tiny-GGUF" / "refs" / "main").read_text() == COMMIT
    assert model["quantization"] == "Q4_K_M"
    assert (model["context"], model["licence"], model["source"]) == (4096, "mit", "hub")
    assert len(bodies(hub)) == 1
    assert pulled("org/tiny-GGUF:q4_k_m") == model
    assert pulled("hf:org/tiny-GGUF/tiny-Q4_K_M.gguf")["file"] == str(file)
    assert len(bodies(hub)) == 1  # the second name found the same file
    removed = edgelm("rm", "org/tiny-GGUF:q4_k_m")
    assert removed.returncode == 0
    assert not file.exists()


def test_split_models_come_whole(hub):
    model = pulled("org/tiny-GGUF:Q8_0")
    assert [Path(file).read_bytes() for file in model["files"]] == SHARDS
    assert model["file"] == model["files"][0]
    assert model["size_bytes"] == 3000


def test_a_model_folder_comes_whole_and_runs(hub, home, tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "source", "llama", n_files=2, quantized={"": (4, 32)}, dtype="F16")
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Hub, "files", {**there, "README.md": b"hello", "pytorch_model.bin": b"another format"})
    model = pulled("org/tiny-GGUF")
    assert sorted(Path(file).name for file in model["files"]) == sorted(there)
    assert Path(model["file"]) == Path(model["files"][0]).parent
    assert model["quantization"] == "MLX 4-bit"
    assert model["size_bytes"] == sum(map(len, there.values()))
    with load(locate("org/tiny-GGUF"), backend="numpy", memory="500MB") as loaded:
        assert list(loaded.stream("the", max_tokens=2))
    assert edgelm("rm", "org/tiny-GGUF").returncode == 0
    assert not any(Path(file).exists() for file in model["files"])


def test_a_broken_connection_goes_on_in_the_same_pull_and_in_the_next(hub, home):
    hub.cut_after_bytes = 250_000
    failed = edgelm("pull", "org/tiny-GGUF:Q4_K_M")
    assert failed.returncode == 3
    assert "of 3000000 bytes" in failed.stderr
    assert failed.stderr.count("\n") == 1
    starts = [start_of(request) for request in bodies(hub)]
    assert len(starts) > 1
    assert starts == sorted(set(starts))  # each attempt began further on
    assert not list((home / "hf").rglob("*.gguf"))
    hub.cut_after_bytes = None
    hub.requests.clear()
    assert Path(pulled("org/tiny-GGUF:Q4_K_M")["file"]).read_bytes() == MODEL
    (request,) = bodies(hub)
    assert start_of(request) > starts[-1]


def test_a_server_without_ranges_sends_all_again(hub):
    hub.cut_after_bytes = 400_000
    assert edgelm("pull", "org/tiny-GGUF:Q4_K_M").returncode == 3
    hub.cut_after_bytes, hub.ranges = None, False
    assert Path(pulled("org/tiny-GGUF:Q4_K_M")["file"]).read_bytes() == MODEL


def test_wrong_bytes_are_kept_aside_and_not_registered(hub, home):
    hub.promised["tiny-Q4_K_M.gguf"] = "a" * 64
    failed = edgelm("pull", "org/tiny-GGUF:Q4_K_M")
    assert failed.returncode == 3
    assert f"has sha256 {hashlib.sha256(MODEL).hexdigest()} instead of {'a' * 64}" in failed.stderr
    (aside,) = (home / "hf").rglob("*.mismatch")
    assert aside.read_bytes() == MODEL
    assert not list((home / "hf").rglob("*.gguf"))


def test_offline_uses_what_the_hub_cache_has(hub, home, monkeypatch):
    missing = edgelm("pull", "org/tiny-GGUF:Q4_K_M", "--offline")
    assert missing.returncode == 3
    assert "pull it once without --offline" in missing.stderr
    first = pulled("hf:org/tiny-GGUF/tiny-Q4_K_M.gguf")
    hub.requests.clear()
    assert pulled("org/tiny-GGUF:Q4_K_M", "--offline")["file"] == first["file"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert edgelm("pull", "org/tiny-GGUF:Q8_0").returncode == 2  # of this repository only Q4_K_M is here
    assert hub.requests == []


def test_a_repository_that_does_not_exist(hub):
    failed = edgelm("pull", "org/nothing:Q4_0")
    assert failed.returncode == 3
    assert "check the spelling; a private repository needs HF_TOKEN" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_the_environment_decides_where_the_hub_is(child_command, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    failed = child_command("pull", "org/tiny-GGUF:Q4_0")
    assert failed.code == 3
    assert "check the network and HF_ENDPOINT" in failed.err


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/repo:Q4_K_M", HubName("org/repo", quantization="Q4_K_M")),
        ("org/repo", HubName("org/repo")),
        ("hf:org/repo:Q8_0", HubName("org/repo", quantization="Q8_0")),
        ("hf:org/repo/sub/file.gguf", HubName("org/repo", file="sub/file.gguf")),
        ("smollm2-135m-instruct", None),
        ("models/file.gguf", None),
        ("../org/repo", None),
        ("/abs/path", None),
    ],
)
def test_hub_names(text, name):
    assert parse_hub_name(text) == name


def test_choosing_among_quantizations():
    files = ["a-Q4_K.gguf", "a-Q4_K_M.gguf", "a-IQ4_K_M.gguf", "README.md", "mmproj-a-F16.gguf"]
    assert choose_files(HubName("o/r", quantization="Q4_K"), files) == {"a-Q4_K.gguf"}
    assert choose_files(HubName("o/r", quantization="q4_k_m"), files) == {"a-Q4_K_M.gguf"}
    with pytest.raises(ConfigError, match=r"3 files fit o/r; .*there are: IQ4_K_M, Q4_K, Q4_K_M"):
        choose_files(HubName("o/r"), files)
    with pytest.raises(ConfigError, match="no file fits o/r:Q2_K"):
        choose_files(HubName("o/r", quantization="Q2_K"), files)
    with pytest.raises(ConfigError, match="holds no GGUF file"):
        choose_files(HubName("o/r"), ["model.safetensors"])
    assert choose_files(HubName("o/r", file="a-Q8_0-00001-of-00002.gguf"), [
        "a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf", "a-Q8_0-00001-of-00003.gguf",
    ]) == {"a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf"}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "quantization"),
    [("a-Q4_K_M.gguf", "Q4_K_M"), ("a.iq4_xs.gguf", "IQ4_XS"), ("F16/b-bf16.gguf", "BF16"), ("model.gguf", "?")],
)
def test_quantization_of(file, quantization):
    assert quantization_of(file) == quantization
