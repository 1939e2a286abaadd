"""Where ggml's libraries are looked for: what was compiled on this machine goes before what came ready-made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgelm_llamacpp import ggml


def test_ready_made_libraries_come_after_compiled_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, folder in (("libggml", "lib64"), ("llama_cpp", "lib")):
        monkeypatch.delitem(sys.modules, package, raising=False)  # of another test, and found before any folder
        (tmp_path / package / folder).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / folder / "libggml-cpu.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("EDGELM_GGML", raising=False)
    found = [line.split(" ")[0] for line in ggml.identity().splitlines() if str(tmp_path) in line]
    assert found == [
        str(tmp_path / "llama_cpp/lib/libggml-cpu.so"),
        str(tmp_path / "libggml/lib64/libggml-cpu.so"),
    ]


def test_a_folder_that_is_named_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libggml-cpu.so").touch()
    monkeypatch.setenv("EDGELM_GGML", str(tmp_path))
    assert [Path(line.split(" ")[0]).parent for line in ggml.identity().splitlines()] == [tmp_path]
