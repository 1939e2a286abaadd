"""Models that embed texts: ids and vectors of libllama, the same bits at every budget, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_samples import sample

import edgelm
import edgelm_numpy.rows
from edgelm.engine.embedding import normalized, pool
from edgelm.errors import ConfigError, ContextOverflow, UnsupportedModel
from edgelm.files import open_model
from edgelm.testing import tiny_model
from edgelm.testing.evaluate import evaluate
from edgelm.testing.tiny_encoder import ENCODERS, tiny_encoder
from edgelm.text.tokenizer import load_tokenizer

TEXTS = ("The weather in the town is 12 and cold, or so they say!", "again", "", "one and the other " * 6)


def libllama(path: Path, **options: Any) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python to compare with")
    return llama_cpp.Llama(str(path), n_threads=1, n_threads_batch=1, verbose=False, **options)


def theirs(path: Path, texts: tuple[str, ...] = TEXTS, normalize: bool = True) -> np.ndarray[Any, Any]:
    model = libllama(path, embedding=True, n_ctx=128, flash_attn=False)
    try:
        return np.array([model.embed(text, normalize=normalize) for text in texts], np.float32)
    finally:
        model.close()


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tokenizer.ggml.normalizer.lowercase": False},
        {"tokenizer.ggml.normalizer.lowercase": False, "tokenizer.ggml.normalizer.strip_accents": True},
        {"tokenizer.ggml.add_sep_token": False},
    ],
    ids=["plain", "cased", "cased without accents", "no separator"],
)
def test_ids_equal_libllama(metadata: dict[str, Any], tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", "bert", metadata=metadata)
    model, ours = libllama(path, vocab_only=True), load_tokenizer(open_model(path), cache_dir=tmp_path)
    rng = random.Random(5)
    words = ("the", "weather", "again", "TOWN", "éa", "ß", "字", "[CLS]", "[SEP]", "[MASK]", "x.y", " ", "\t", "and,")
    for _ in range(400):
        text = sample(rng) if rng.random() < 0.5 else "".join(rng.choice(words) for _ in range(rng.randrange(12)))
        text = "".join(char for char in text if char.isprintable() or char in " \t\n\x00\x01")
        special, add_bos = rng.random() < 0.5, rng.random() < 0.5
        expected = model.tokenize(text.encode(), add_bos=add_bos, special=special)
        assert ours.encode(text, parse_special=special, add_bos=None if add_bos else False) == expected, repr(text)
    model.close()


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("types", ["F32", "Q8_0"])
def test_states_equal_libllama(architecture: str, types: str, tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", architecture, pooling="none", types=types)
    model = libllama(path, embedding=True, n_ctx=128, flash_attn=False)
    expected = np.array(model.embed(TEXTS[0]), np.float32)
    model.close()
    ids = load_tokenizer(open_model(path), cache_dir=tmp_path).encode(TEXTS[0])
    assert np.abs(evaluate(path, ids, backend="llamacpp") - expected).max() <= 1e-6


@pytest.mark.parametrize("architecture", ENCODERS)
def test_the_oracle_agrees_with_libllama(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the GELU of ggml, which is a table of float16 on the processor."""
    exact = edgelm_numpy.rows._gelu

    def from_a_table(x: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        exact(x.astype(np.float16).astype(np.float32), out)
        out[...] = out.astype(np.float16)

    path = tiny_encoder(tmp_path / "tiny.gguf", architecture)
    expected = theirs(path)
    with edgelm.load(path, backend="numpy") as model:
        assert np.abs(model.embed(TEXTS) - expected).max() <= (1e-5 if architecture == "nomic-bert" else 1e-3)
    monkeypatch.setattr(edgelm_numpy.rows, "_gelu", from_a_table)
    with edgelm.load(path, backend="numpy") as model:
        found = model.embed(TEXTS)
    assert np.abs(found - expected).max() <= 2e-5


@pytest.mark.parametrize("architecture", ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooled_as_the_file_says(architecture: str, pooling: str, tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", architecture, pooling=pooling, types="Q8_0")
    with edgelm.load(path, backend="llamacpp") as model:
        found = model.embed(TEXTS)
        raw = model.embed(TEXTS, normalize=False)
    assert found.dtype == np.float32
    assert np.abs(found - theirs(path)).max() <= 1e-6
    assert np.abs(raw - theirs(path, normalize=False)).max() <= 1e-5
    assert np.allclose(np.linalg.norm(found, axis=1), 1)


def test_tables_of_other_types(tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", "bert", table_type="F16", pooling="cls")
    found = []
    for backend in ("numpy", "llamacpp"):
        with edgelm.load(path, backend=backend) as model:
            found.append(model.embed(TEXTS))
    assert np.abs(found[0] - found[1]).max() <= 1e-3


def test_vectors_of_tokens_and_other_poolings(tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", "nomic-bert", pooling=None)
    with edgelm.load(path, backend="numpy") as model:
        rows = model.embed_tokens(TEXTS[0])
        assert rows.shape == (len(model.tokenizer.encode(TEXTS[0])), 64)
        assert np.allclose(model.embed([TEXTS[0]], False, pooling="mean")[0], rows.mean(axis=0), atol=1e-6)
        assert np.array_equal(model.embed([TEXTS[0]], pooling="last")[0], normalized(rows[-1]))
        assert model.embed([], pooling="cls").shape == (0, 64)
        with pytest.raises(ConfigError, match="pools nothing"):
            model.embed(TEXTS)
        with pytest.raises(ConfigError, match="list of strings"):
            model.embed("one text")
        with pytest.raises(ConfigError, match="unknown pooling 'max'"):
            model.embed(TEXTS, pooling="max")  # type: ignore[arg-type]
        with pytest.raises(ContextOverflow, match=r"502 tokens.*128"):
            model.embed(["x" + " the" * 499], pooling="mean")
        assert np.array_equal(model.embed_tokens(TEXTS[0]), rows), "an error leaves the model as it was"


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", "bert")
    with edgelm.load(path, backend="numpy") as model:
        for write in (model.chat, lambda: model.generate("hi"), lambda: model.score("hi there")):
            with pytest.raises(UnsupportedModel, match="bert models embed texts"):
                write()
        with pytest.raises(UnsupportedModel, match="no logits to compare"):
            edgelm.verify(path)
        model.set_budget("1GB")
        assert model.embed(TEXTS).shape == (4, 64)


def test_a_model_that_writes_embeds_nothing(tmp_path: Path) -> None:
    with (
        edgelm.load(tiny_model(tmp_path / "tiny.gguf", "llama"), backend="numpy") as model,
        pytest.raises(UnsupportedModel, match="llama models write texts"),
    ):
        model.embed(["hi"])


@pytest.mark.parametrize("backend", ["onnx", "mlx", "npu", "npu+numpy"])
def test_other_backends_refuse(backend: str, tmp_path: Path) -> None:
    path = tiny_encoder(tmp_path / "tiny.gguf", "bert")
    with pytest.raises((UnsupportedModel, edgelm.BackendUnavailable)):
        edgelm.load(path, backend=backend)


def test_what_cannot_be_embedded_is_refused(tmp_path: Path) -> None:
    ranks = tiny_encoder(tmp_path / "ranks.gguf", "bert", pooling="rank")
    with edgelm.load(ranks, backend="numpy") as model, pytest.raises(UnsupportedModel, match="pooling_type is 4"):
        model.embed(TEXTS)
    with pytest.raises(ConfigError, match="128 positions, not 512"):
        edgelm.load(ranks, backend="numpy", context=512)
    causal = tiny_encoder(tmp_path / "causal.gguf", "bert", metadata={"bert.attention.causal": True})
    with pytest.raises(UnsupportedModel, match="causal"):
        edgelm.load(causal, backend="numpy")


def test_zeros_stay_zeros() -> None:
    rows = np.zeros((3, 4), np.float32)
    assert not normalized(pool(rows, "mean")).any()
