"""Low-bit copies: the bytes in them, what keeps them from being made, and what happens when that is cut short."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgelm
from edgelm import copying
from edgelm.errors import ConfigError, ModelFileError, PreparationError, UnsupportedModel
from edgelm.files import drafts
from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import TensorType
from edgelm.files.gguf import open_model
from edgelm.files.model import TensorInfo
from edgelm.files.quantize import to_q4_0
from edgelm.testing import tiny_folder, tiny_model

GGML = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp's library is not installed")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384)


def raw(path: Path, info: TensorInfo) -> np.ndarray:
    content = path.read_bytes()[info.offset : info.offset + info.n_bytes]
    return np.frombuffer(content, np.uint8).reshape(info.n_rows, -1)


def test_matrices_are_rounded_and_all_else_stays(model: Path) -> None:
    copy = edgelm.draft_copy(model)
    source, made = open_model(model), open_model(copy.path)
    assert list(made.tensors) == list(source.tensors)
    for name, info in made.tensors.items():
        before = source.tensors[name]
        given = raw(model, before)
        if before.n_rows == 1:
            assert (info.type, raw(copy.path, info).tobytes()) == (before.type, given.tobytes())
        else:
            assert info.type is TensorType.Q4_0
            assert np.array_equal(raw(copy.path, info), to_q4_0(dequantize(before.type, given)))
    assert set(made.metadata) == {*source.metadata, drafts.OF_KEY} - {"general.file_type"}
    assert all(np.all(made.metadata[key] == source.metadata[key]) for key in set(made.metadata) - {drafts.OF_KEY})
    assert (copy.made, copy.type, copy.size_bytes) == (True, "Q4_0", copy.path.stat().st_size)
    assert copy.source_bytes == model.stat().st_size


def test_it_is_made_once_and_found_by_its_model_only(model: Path, tmp_path: Path) -> None:
    other = open_model(tiny_model(tmp_path / "other.gguf", "llama", n_vocab=400))
    copy = edgelm.draft_copy(model)
    assert not edgelm.draft_copy(model).made
    assert drafts.find(open_model(model)) == copy.path
    assert drafts.find(other) is None


def test_what_has_fewer_bits_or_no_whole_blocks_stays_as_it_is(tmp_path: Path) -> None:
    types = {"default": "F32", "ffn_down": "Q4_0", "attn_q": "Q2_K"}
    model = tiny_model(tmp_path / "mixed.gguf", "llama", types=types, n_vocab=384)
    tensors = open_model(edgelm.draft_copy(model).path).tensors
    assert tensors["blk.0.attn_q.weight"].type is TensorType.Q2_K
    assert tensors["blk.0.ffn_down.weight"].type is TensorType.Q4_0
    narrow = tiny_model(tmp_path / "narrow.gguf", "llama", n_embd=80, n_vocab=384)
    tensors = open_model(edgelm.draft_copy(narrow).path).tensors
    assert tensors["blk.0.ffn_up.weight"].type is TensorType.F32
    assert tensors["blk.0.ffn_down.weight"].type is TensorType.Q4_0


@GGML
def test_rows_that_are_no_whole_blocks_of_the_type_become_q4_0(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tails.gguf", "llama", n_embd=96, n_ff=256, n_vocab=384)
    made = edgelm.draft_copy(model, "Q2_K")
    types = {name: info.type.name for name, info in open_model(made.path).tensors.items() if info.n_rows > 1}
    assert types["blk.0.ffn_down.weight"] == "Q2_K"
    assert {kind for name, kind in types.items() if "ffn_down" not in name} == {"Q4_0"}
    assert made.path.name.endswith("-Q2_K.gguf")


@GGML
def test_ggml_and_numpy_round_alike() -> None:
    rows = np.random.default_rng(3).normal(size=(40, 256)).astype(np.float32)
    rows[3, :64] = 0
    assert np.array_equal(copying._rounder(TensorType.Q8_0)(rows)[:, :2], _scales(rows))
    from edgelm_llamacpp import BACKEND

    rounded = BACKEND.rounding(TensorType.Q4_0)
    assert rounded is not None
    assert np.array_equal(rounded(rows), to_q4_0(rows))


def _scales(rows: np.ndarray) -> np.ndarray:
    return (np.abs(rows[:, :32]).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16).view(np.uint8)


def test_a_pack_and_a_split_model_are_copied_too(model: Path, tmp_path: Path) -> None:
    plain = edgelm.draft_copy(model)
    split = tiny_model(tmp_path / "parts.gguf", "llama", n_vocab=384, n_parts=2)
    for other in (edgelm.pack(model, tmp_path / "tiny.edgelm.gguf").path, split):
        copy = edgelm.draft_copy(other)
        assert copy.path != plain.path
        ours, theirs = open_model(plain.path).tensors, open_model(copy.path).tensors
        assert all(np.array_equal(raw(plain.path, ours[name]), raw(copy.path, theirs[name])) for name in ours)


def test_types_that_make_no_draft_are_refused(model: Path, tmp_path: Path) -> None:
    for name in ("nonsense", "F16", "AFFINE4_G64_BF16"):
        with pytest.raises(ConfigError, match="is no type of few bits"):
            edgelm.draft_copy(model, name)
    with pytest.raises(ConfigError, match="no matrix that TQ1_0 would make smaller"):
        edgelm.draft_copy(model, "TQ1_0")
    with pytest.raises(ConfigError, match="nothing here rounds weights to IQ2_XXS"):
        edgelm.draft_copy(tiny_model(tmp_path / "wide.gguf", "llama", n_embd=256, n_vocab=384), "IQ2_XXS")
    small = tiny_model(tmp_path / "small.gguf", "llama", types="Q4_0", n_vocab=384)
    with pytest.raises(ConfigError, match="too much for a draft; name a type of fewer bits"):
        edgelm.draft_copy(small)
    with pytest.raises(ModelFileError, match="copies are made of GGUF files"):
        edgelm.draft_copy(tiny_folder(tmp_path / "folder", "llama"))
    strange = tiny_model(tmp_path / "strange.gguf", "llama", metadata={"general.architecture": "unheard-of"})
    with pytest.raises(UnsupportedModel):
        edgelm.draft_copy(strange)
    assert drafts.listing() == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "free_bytes", lambda _: 1000)
    with pytest.raises(PreparationError, match=r"the copy takes .*, and 1 kB are free"):
        edgelm.draft_copy(model)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setattr(copying, "_write", full)
    with pytest.raises(PreparationError, match="No space left on device"):
        edgelm.draft_copy(model)
    assert list(drafts.folder().iterdir()) == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system cannot kill a process at once")
def test_a_killed_copy_has_no_name_and_the_next_clears_up(model: Path) -> None:
    code = (
        "import os, signal, sys, edgelm\n"
        "def die(done, total):\n    if 2 * done > total: os.kill(os.getpid(), signal.SIGKILL)\n"
        "edgelm.draft_copy(sys.argv[1], progress=die)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(model)], env=dict(os.environ), timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = list(drafts.folder().iterdir())
    assert [path.suffix for path in left] == [".partial"]
    assert drafts.find(open_model(model)) is None
    copy = edgelm.draft_copy(model)
    assert list(drafts.folder().iterdir()) == [copy.path]


def test_a_damaged_copy_is_listed_and_removed(model: Path) -> None:
    copy = edgelm.draft_copy(model)
    assert [(file.model, file.type) for file in drafts.listing()] == [("tiny.gguf", "Q4_0")]
    copy.path.write_bytes(b"GGUF, or not")
    assert [file.model for file in drafts.listing()] == ["damaged"]
    assert drafts.remove(open_model(model).fingerprint) == 12
    assert drafts.listing() == []
