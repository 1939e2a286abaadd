"""Model folders of every architecture: the same numbers as a GGUF file of the same weights, and as mlx-lm's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import edgelm
from edgelm.engine import foldertext
from edgelm.engine.folders import open_folder
from edgelm.engine.health import check
from edgelm.errors import UnsupportedModel
from edgelm.files.prepared import listing
from edgelm.files.safetensors import read_arrays
from edgelm.testing import ARCHITECTURES, tiny_folder, tiny_model
from edgelm.testing.evaluate import evaluate, logits_error
from edgelm.testing.tiny_folder import write_safetensors

N_TOKENS = 40  # beyond the sliding windows of the tiny models, which are 16
IDS = np.random.default_rng(7).integers(0, 250, N_TOKENS).tolist()
SIDE_BY_SIDE = ("llama", "smollm3", "granite")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ARCHITECTURES},
    "gemma2": ("gemma2", {"sliding_window": 64}),  # mlx-lm lets no layer of it slide
    "llama untied, with biases": ("llama", {"tied": False, "biases": True}),
    "llama3 scaling": ("llama", {"rope_scaling": "llama3", "rope_factor": 8.0}),
    "llama linear": ("llama", {"rope_scaling": "linear"}),
    "qwen3 yarn": ("qwen3", {"rope_scaling": "yarn", "n_context": 256}),
    "phi3 longrope": ("phi3", {"rope_scaling": "longrope", "n_original_context": 16}),
    "phi3 with a part rotated": ("phi3", {"rope_dim": 8, "config": {"partial_rotary_factor": 0.5}}),
    "quantized": ("qwen2", {"quantized": {"": (4, 32)}}),
    "quantized, half precision": ("qwen3", {"quantized": {"": (4, 64)}, "dtype": "F16"}),
    "quantized, several ways": (
        "llama",
        {
            "quantized": {"": (8, 64), "down_proj": (3, 128), "q_proj": (6, 32), "v_proj": (5, 32), "embed": (2, 64)},
            "dtype": "BF16",
            "n_files": 3,
        },
    ),
    "gemma3, quantized": ("gemma3", {"quantized": {"": (4, 32), "down": None}, "dtype": "BF16"}),
    "gemma3 linear": ("gemma3", {"rope_scaling": "linear"}),
}


def mlx_logits(folder: Path) -> npt.NDArray[np.float32]:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    mx.set_default_device(mx.cpu)
    model, _ = utils.load_model(folder)
    model.set_dtype(mx.float32)  # weights keep their values; mlx-lm would compute in the folder's half precision
    return np.array(model(mx.array([IDS]))[0].astype(mx.float32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_mlx_lm(variant: str, tmp_path: Path) -> None:
    architecture, options = VARIANTS[variant]
    folder = tiny_folder(tmp_path / "model", architecture, **options)
    theirs = mlx_logits(folder)
    assert logits_error(evaluate(folder, IDS), theirs) < 2e-2  # keys and values are float16 here, float32 there


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_the_gguf_file(architecture: str, tmp_path: Path) -> None:
    options = {"n_layers": 5, "tied": False} if architecture == "llama" else {}
    gguf = evaluate(tiny_model(tmp_path / "m.gguf", architecture, **options), IDS)
    ours = evaluate(tiny_folder(tmp_path / "model", architecture, **options), IDS)
    if architecture in SIDE_BY_SIDE or architecture.startswith("gemma"):  # sums in another order; w - 1 + 1 rounds
        assert logits_error(ours, gguf) < 5e-3
    else:
        assert np.array_equal(ours, gguf)


def test_weights_at_odd_places_are_the_same(tmp_path: Path) -> None:
    plain, odd = (tiny_folder(tmp_path / name, "qwen2", dtype="BF16") for name in ("plain", "odd"))
    path = odd / "model.safetensors"
    content = path.read_bytes()
    n = int.from_bytes(content[:8], "little") + 1  # one blank more behind the header
    path.write_bytes(n.to_bytes(8, "little") + content[8 : 7 + n] + b" " + content[7 + n :])
    assert {how.how for how in open_folder(odd).derived.values()} == {"copy", "float32"}
    assert np.array_equal(evaluate(odd, IDS), evaluate(plain, IDS))


def test_rope_parameters_of_new_configs_mean_the_same(tmp_path: Path) -> None:
    old = tiny_folder(tmp_path / "old", "gemma3", rope_scaling="linear")
    full = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1_000_000.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    gone = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"))
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {**gone, "rope_parameters": rope, "layer_types": layers}
    new = tiny_folder(tmp_path / "new", "gemma3", rope_scaling="linear", config=config)
    assert np.array_equal(evaluate(new, IDS), evaluate(old, IDS))


def test_of_a_model_that_sees_the_text_is_loaded(tmp_path: Path) -> None:
    plain, seeing = tiny_folder(tmp_path / "plain", "gemma3"), tiny_folder(tmp_path / "seeing", "gemma3")
    config = json.loads((seeing / "config.json").read_text())
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 8}}
    (seeing / "config.json").write_text(json.dumps(whole))
    path = seeing / "model.safetensors"
    content, arrays = path.read_bytes(), read_arrays(path).arrays
    parts = {f"language_model.{a.name}": (a.dtype, a.shape, content[a.offset : a.offset + a.n_bytes]) for a in arrays}
    write_safetensors(path, {**parts, "vision_tower.patch.weight": ("F32", (2, 2), bytes(16))})
    assert np.array_equal(evaluate(seeing, IDS), evaluate(plain, IDS))


def test_a_folder_that_embeds_texts_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "gemma3", config={"use_bidirectional_attention": True})
    with pytest.raises(UnsupportedModel, match="GGUF files only"):
        open_folder(folder)


def test_long_contexts_take_the_long_factors(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}  # Phi-3 mini's
    model = open_folder(tiny_folder(tmp_path, "phi3", rope_scaling="longrope", config=config))
    factors = np.frombuffer(model.derived["rope_factors_long.weight"].content, np.float32)
    assert np.array_equal(factors, np.linspace(1.0, 16.0, 8).astype(np.float32))
    assert model.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx(1.1902, abs=1e-4)
    assert model.metadata["phi3.rope.scaling.original_context_length"] == 4096


def test_a_folder_has_a_fingerprint_of_all_that_decides_the_tokens(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    seen = {open_folder(folder).fingerprint}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text(encoding="utf-8") + " ", encoding="utf-8")
        seen.add(open_folder(folder).fingerprint)
    assert len(seen) == 4
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    assert open_folder(copied).fingerprint in seen


def test_a_folder_is_loaded_like_a_file(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gemma3", quantized={"": (4, 32)}, dtype="BF16")
    ends = {"eos_token_id": [1, 7]}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}<|im_start|>{{ messages[0].content }}")
    said: list[str] = []
    with edgelm.load(folder, backend="numpy", memory="500MB", notice=said.append) as model:
        assert model.tokenizer.eos_ids >= {1, 7, 2}
        assert model.tokenizer.adds_bos
        assert model.template.source == "file"
        prompt = model.template.render([{"role": "user", "content": "the"}])
        assert model.tokenizer.encode_prompt(prompt)[:2] == [1, model.tokenizer.find("<|im_start|>")]
        expected = evaluate(folder, IDS)[-1]
        assert next(chunk.token_id for chunk in model.stream_ids(IDS, max_tokens=1)) == int(expected.argmax())
    assert not said  # this backend computes with MLX's weights as they are


def test_inspection_shows_config_and_types(tmp_path: Path) -> None:
    report = edgelm.inspect(tiny_folder(tmp_path / "model", "qwen3", quantized={"": (8, 64)}, dtype="F16"))
    assert report.architecture == "qwen3"
    assert report.metadata["qwen3.block_count"] == 3
    assert {tensor.type for tensor in report.tensors} == {"AFFINE8_G64_F16", "F32"}
    assert report.template


def test_converted_weights_are_prepared_once_and_said(tmp_path: Path) -> None:
    if not check("llamacpp").available:
        pytest.skip("backend llamacpp is not available")
    folder = tiny_folder(tmp_path / "model", "llama", quantized={"": (8, 32)}, dtype="BF16")
    said: list[str] = []
    for _ in range(2):
        with edgelm.load(folder, backend="llamacpp", memory="500MB", notice=said.append) as model:
            note = next(note for note in model.notes if "converted" in note)
            assert "AFFINE8_G32_BF16 as F16 (8-bit weights are held as float16" in note
            first = [chunk.token_id for chunk in model.stream_ids(IDS, max_tokens=4)]
    assert len(said) == 1
    assert "preparing model for the llamacpp backend, once" in said[0]
    with edgelm.load(folder, backend="llamacpp", memory="500MB") as model:
        assert [chunk.token_id for chunk in model.stream_ids(IDS, max_tokens=4)] == first
    (listed,) = listing()
    assert (listed.model, listed.backend) == ("model", "llamacpp")


def test_large_tokenizers_are_read_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    monkeypatch.setattr(foldertext, "_SMALL_BYTES", 0)
    monkeypatch.setattr(foldertext, "read_object", None)  # whoever parses tokenizer.json here fails
    with edgelm.load(folder, backend="numpy", memory="500MB") as model:
        assert model.tokenizer.find("<|im_end|>") is not None


def test_packs_are_made_of_files(tmp_path: Path) -> None:
    with pytest.raises(edgelm.ModelFileError, match="a folder needs no pack"):
        edgelm.pack(tiny_folder(tmp_path / "model", "llama"))
