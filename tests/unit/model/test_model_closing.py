"""The public model: loading, and giving memory back."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streams import PROMPT, eventually, in_thread, join, load, long

import edgelm
from edgelm import Chunk
from edgelm.memory.platform import current_platform
from edgelm.testing import tiny_model


def test_close_twice_and_use_after_close(model_file: Path) -> None:
    model = load(model_file)
    model.generate(PROMPT, max_tokens=2)
    model.close()
    model.close()
    model.cancel()
    with pytest.raises(edgelm.ConfigError, match="closed"):
        model.stream(PROMPT)
    with pytest.raises(edgelm.ConfigError, match="closed"):
        model.chat().send("hi")


def test_close_with_a_stream_left_halfway_in_this_thread(model_file: Path) -> None:
    """As when an exception leaves the `with` block while a stream is still referred to."""
    with load(model_file) as model:
        stream, waiting = long(model), long(model)
        next(stream)
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert [chunk.finish_reason for chunk in waiting] == ["cancelled"]


def test_close_stops_a_stream_of_another_thread(model_file: Path) -> None:
    model = load(model_file)
    chunks: list[Chunk] = []
    thread = in_thread(lambda: chunks.extend(model.stream("the", max_tokens=120, ignore_eos=True)))
    eventually(lambda: model.turns._current)
    model.close()
    join(thread)
    assert chunks[-1].finish_reason in ("cancelled", "length")


def test_closing_from_inside_a_generation_is_a_mistake(model_file: Path) -> None:
    with load(model_file) as model:

        def close(history: Any, logits: Any) -> Any:
            model.close()
            return logits

        with pytest.raises(edgelm.ConfigError, match="inside a generation"):
            model.generate(PROMPT, processors=[close])


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "wide.gguf", "llama", n_layers=6, n_embd=512, n_heads=8, head_dim=64, n_ff=2048)
    size = path.stat().st_size
    assert size > 60_000_000
    rss = current_platform().rss_bytes
    load(path).close()  # what libraries keep is kept once
    gc.collect()
    before = rss()
    model = load(path)
    model.generate("the", max_tokens=2)
    loaded = rss()
    model.close()
    gc.collect()
    assert loaded - before > 0.8 * size
    assert rss() - before < 0.2 * size


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_model_from_before_a_fork_is_a_typed_error(model_file: Path) -> None:
    code = (
        "import edgelm, os, sys\n"
        "model = edgelm.load(sys.argv[1], memory='300MB', context=32, backend='numpy', threads=1)\n"
        "if pid := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "try:\n"
        "    model.generate('a', max_tokens=1)\n"
        "except edgelm.ConfigError as error:\n"
        "    os._exit(7 if 'after the fork' in str(error) else 1)\n"
        "os._exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(model_file)], timeout=60, check=False)
    assert done.returncode == 7


def test_a_backend_that_is_not_there_is_a_typed_error(model_file: Path) -> None:
    with pytest.raises(edgelm.UnknownBackend, match="numpy"):
        load(model_file, backend="onxx")


def test_wrong_options_of_load_are_typed_errors(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(edgelm.ConfigError, match="threads"):
        load(model_file, threads=0)
    with pytest.raises(edgelm.ConfigError, match="threads must be at most 512"):
        load(model_file, threads=100_000)
    with pytest.raises(edgelm.ConfigError, match="context"):
        load(model_file, context=3)
    with pytest.raises(edgelm.ConfigError, match="size"):
        load(model_file, memory="lots")
    for no_size in (3e8, [], "9" * 400):
        with pytest.raises(edgelm.ConfigError, match="is not a size"):
            load(model_file, memory=no_size)
    with pytest.raises(edgelm.ModelNotFound):
        load(tmp_path / "nothing.gguf")
    with pytest.raises(edgelm.BudgetTooSmall) as caught:
        load(model_file, memory="1MB")
    assert len(caught.value.items) == 3


def test_a_budget_that_is_refused_leaves_no_file_open(model_file: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("this system does not list open files")

    def opened() -> list[str]:
        return sorted(os.readlink(link) for link in folder.iterdir() if link.is_symlink())

    def refused() -> None:
        with pytest.raises(edgelm.BudgetTooSmall):
            load(model_file, memory="1MB")

    refused()
    assert str(model_file) not in opened()
