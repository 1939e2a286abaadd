"""The files that the documentation speaks of, made where a page names them: tiny random models, and texts.

Names of the catalogue stand for the real models, where this machine has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from fences import ROOT

from edgelm.testing import tiny_folder, tiny_model
from edgelm.testing.tiny_encoder import tiny_encoder
from edgelm_models.cache import CachedModel, safe_name
from edgelm_models.catalogue import CATALOGUE

CONTEXT = 1024
"""Room for a prompt of 512 tokens; the answer of a random model may go on to the end of it."""
Make = Callable[[Path], object]


def _genai(folder: Path) -> None:
    from edgelm.testing.tiny_genai import tiny_genai

    tiny_genai(folder, n_layers=2, n_context=CONTEXT)


def _novel(path: Path, n_characters: int = 3000) -> None:
    text = (ROOT / "edgelm/parity/persuasion.txt").read_text(encoding="utf-8")
    path.write_text(text[:n_characters], encoding="utf-8")


def _lines(path: Path) -> None:
    path.write_text("a cat sleeps\na dog barks\nthe sea is cold\n", encoding="utf-8")


_llama = partial(tiny_model, architecture="llama", n_context=CONTEXT)
_FOLDER = "path/to/folder"
FILES: dict[str, Make] = {
    "model.gguf": partial(_llama, types="Q8_0"),
    "small.gguf": partial(_llama, types="Q8_0", n_layers=1, seed=1),
    "large.gguf": partial(_llama, types="Q8_0", n_layers=5, seed=2),
    "model-f16.gguf": partial(_llama, types="F16"),
    "all-MiniLM-L6-v2.gguf": partial(tiny_encoder, architecture="bert"),
    _FOLDER: partial(tiny_folder, architecture="llama", dtype="BF16", n_context=CONTEXT),
    "notes.txt": partial(_novel, n_characters=600),
    "novel.txt": _novel,
    "lines.txt": _lines,
}
OTHERWISE: dict[str, dict[str, Make]] = {"onnx.md": {_FOLDER: _genai, "smollm2-int4": _genai}}
"""What a page means by a name, where it means something else."""


def lay_out(page: str, text: str, place: Path) -> None:
    """Make the files that the text of a page names, in a folder."""
    for name, make in (FILES | OTHERWISE.get(page, {})).items():
        if name in text:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            make(place / name)


def register(cache: Path, models: Mapping[str, Path]) -> None:
    """Put real models into a cache folder, as if they had been pulled: as links."""
    for name, path in models.items():
        entry = CATALOGUE[name]
        folder = cache / "models" / safe_name(name)
        folder.mkdir(parents=True)
        (folder / entry.file_name).symlink_to(path)
        model = CachedModel(
            name, entry.file_name, (entry.file_name,), entry.size_bytes, entry.sha256, entry.quantization,
            entry.context, entry.licence, "wheels", 0.0,
        )  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(model._asdict()))
