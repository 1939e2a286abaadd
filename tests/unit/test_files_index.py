"""A model opened from the index is the model opened from its header."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgelm.cachedir import cache_dir
from edgelm.errors import EdgeLMError
from edgelm.files import gguf
from edgelm.files.index import open_indexed
from edgelm.testing import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "gemma3")


def refuse(path: object) -> gguf.ModelFile:
    raise AssertionError(f"{path} was read again")


def test_the_second_opening_reads_no_header(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_indexed(model)
    monkeypatch.setattr(gguf, "open_model", refuse)
    again = open_indexed(model)
    assert dict(again.tensors) == dict(whole.tensors)
    assert (again.fingerprint, again.architecture, again.paths) == (whole.fingerprint, whole.architecture, whole.paths)
    assert set(again.metadata) == set(whole.metadata)
    assert again.metadata["gemma3.block_count"] == whole.metadata["gemma3.block_count"]


def test_arrays_come_from_the_file_when_asked_for(model: Path) -> None:
    whole = open_indexed(model)
    again = open_indexed(model)
    assert list(again.metadata["tokenizer.ggml.tokens"]) == list(whole.metadata["tokenizer.ggml.tokens"])
    assert np.array_equal(again.metadata["tokenizer.ggml.scores"], whole.metadata["tokenizer.ggml.scores"])


def test_a_file_that_changed_is_read_again(model: Path) -> None:
    before = open_indexed(model)
    tiny_model(model, "llama", seed=1)
    assert open_indexed(model).architecture == "llama" != before.architecture


def test_a_file_that_is_gone_is_an_error(model: Path) -> None:
    open_indexed(model)
    os.unlink(model)
    with pytest.raises(EdgeLMError):
        open_indexed(model)


def test_a_damaged_index_is_ignored(model: Path) -> None:
    whole = open_indexed(model)
    (kept,) = (cache_dir() / "headers").iterdir()
    for damage in (b"", b"{}", b"[1]", kept.read_bytes().replace(b'"tensors": [[', b'"tensors": [[null, ')):
        kept.write_bytes(damage)
        assert dict(open_indexed(model).tensors) == dict(whole.tensors)
