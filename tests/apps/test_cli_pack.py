"""`edgelm pack` on the command line: where the pack goes, what is said, what Ctrl-C leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edgelm
from edgelm import packing
from edgelm.testing import tiny_model
from edgelm_models import cache
from edgelm_models.cache import CachedModel


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama")


def register(name: str, folder: Path) -> None:
    """Put a tiny model into the cache under this name."""
    staged = folder / "staged"
    staged.mkdir()
    file = tiny_model(staged / "tiny.Q4_1.gguf", "llama")
    entry = CachedModel(name, file.name, (file.name,), file.stat().st_size, "", "F32", 256, "", "wheel", 0.0)
    cache.register(entry, staged)


def test_beside_the_file(edgelm_command, model):
    result = edgelm_command("pack", str(model))
    assert result.code == 0
    assert result.out.startswith(f"{model.with_name('tiny.edgelm.gguf')} (")
    assert result.err == ""  # no bar where there is no terminal
    assert edgelm_command("pack", str(model), "--force", "--quiet") == (0, "", "")


def test_as_json(edgelm_command, model, tmp_path):
    facts = edgelm_command("pack", str(model), str(tmp_path / "out.gguf"), "--json").json()
    assert facts["path"] == str(tmp_path / "out.gguf")
    assert facts["size_bytes"] == (tmp_path / "out.gguf").stat().st_size
    assert set(facts) == {"path", "source", "size_bytes", "weights_bytes", "n_tensors", "n_checksums"}


def test_a_name_is_packed_into_this_folder(edgelm_command, tmp_path, monkeypatch):
    register("smollm2-135m-instruct", tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert edgelm_command("pack", "smollm2-135m-instruct").code == 0
    assert [path.name for path in here.iterdir()] == ["tiny.Q4_1.edgelm.gguf"]


def test_what_cannot_be_written_is_one_sentence(edgelm_command, model, monkeypatch):
    edgelm_command("pack", str(model))
    again = edgelm_command("pack", str(model))
    assert again.code == 1
    assert "--force" in again.err
    assert again.err.count("\n") == 1
    monkeypatch.setattr(packing, "free_bytes", lambda folder: 1000)
    full = edgelm_command("pack", str(model), "--force")
    assert full.code == 1
    assert "1 kB are free there; make room" in full.err
    assert edgelm_command("pack", "gemma-3-270m").code == 3


def test_show_says_what_it_is_a_pack_of(edgelm_command, model):
    assert "a pack" not in edgelm_command("show", str(model)).out
    done = edgelm.pack(model)
    assert "\na pack (version 1) of tiny.gguf\n" in edgelm_command("show", str(done.path)).out
    assert edgelm_command("show", str(done.path), "--json").json()["metadata"]["edgelm.pack.version"] == 1


def test_a_pack_runs_and_says_the_same(edgelm_command, model):
    done = edgelm.pack(model)
    options = ("--raw", "--max-tokens", "6", "--memory", "300MB", "--context", "32", "--backend", "numpy", "--quiet")
    first = edgelm_command("run", str(model), "the end", *options)
    assert first.code == 0
    assert edgelm_command("run", str(done.path), "the end", *options) == first


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C reaches children another way there")
def test_ctrl_c_leaves_nothing(model, tmp_path):
    script = (
        "import sys, time\nfrom edgelm import packing\nfrom edgelm_apps.cli import main\n"
        "copy = packing._copy_tensors\n"
        "def slow(*args):\n    sums = copy(*args)\n    print('copied', flush=True)\n"
        "    time.sleep(30)\n    return sums\n"
        "packing._copy_tensors = slow\nsys.exit(main(sys.argv[1:]))"
    )
    folder = tmp_path / "out"
    folder.mkdir()
    argv = [sys.executable, "-c", script, "pack", str(model), str(folder / "out.gguf")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "copied\n"
        assert len(list(folder.iterdir())) == 1
        began = time.monotonic()
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(timeout=20) == 130
        assert time.monotonic() - began < 20
        assert "Traceback" not in child.stderr.read()
    assert list(folder.iterdir()) == []
