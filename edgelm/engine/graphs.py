"""A folder of onnxruntime-genai as a `ModelFile` and a `GraphModel`, and the backend that computes it.

The header is as complete as that of other models, but for the tensors: the weights are the graph's own.
"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any

from edgelm.engine.backend import GraphBackend
from edgelm.engine.foldertext import FolderMetadata
from edgelm.engine.health import check
from edgelm.engine.registry import backend_names, get_backend
from edgelm.errors import BackendUnavailable, UnknownBackend
from edgelm.files.folder import TEXT_FILES, chunks_of
from edgelm.files.genai import GenaiFolder, read_genai_folder
from edgelm.files.index import GENAI_CONFIG
from edgelm.files.model import ModelFile
from edgelm.hashing import blake2b

NOT_GRAPHS = "it does not compute models that are one ONNX graph"
_HINT = "use --backend onnx, or the model as a GGUF file"


def open_genai(path: Path) -> tuple[ModelFile, GenaiFolder]:
    """Read configuration and graph of a folder; no weights, and no tokenizer before somebody asks for it."""
    folder = read_genai_folder(path)
    graph = folder.model.graph
    paths = (graph.path, *graph.files)
    sizes = tuple(part.stat().st_size for part in paths)
    file = ModelFile(
        paths=paths,
        metadata=FolderMetadata(path, folder.config, _metadata(folder)),
        tensors=MappingProxyType({}),
        architecture=folder.kind,
        header_bytes=0,
        file_bytes=sizes,
        fingerprint=_fingerprint(path, sizes),
    )
    return file, folder


def choose_for_graph(wanted: str) -> tuple[GraphBackend, str, tuple[str, ...]]:
    """Return a backend that computes whole graphs, its name, and a sentence for each that was considered.

    Raises `UnknownBackend`, or `BackendUnavailable` if the wanted one, or any of them, cannot.
    """
    notes: list[str] = []
    for name in backend_names() if wanted == "auto" else (wanted,):
        backend = graph_backend(name)
        if backend is None:
            if wanted != "auto":
                raise BackendUnavailable(name, NOT_GRAPHS, _HINT)
            continue
        found = check(name)  # only of those that could do it: a trial may take a second
        if found.available or found.graphs:
            asked = "" if wanted == "auto" else "as asked for, "
            return backend, name, (*notes, f"{name}: chosen, {asked}the model is one ONNX graph ({found.version})")
        if wanted != "auto":
            raise BackendUnavailable(name, found.reason)
        notes.append(found.reason)
    raise BackendUnavailable("onnx", notes[0] if notes else "it is not installed", "pip install onnxruntime")


def graph_backend(name: str) -> GraphBackend | None:
    """Return the backend of this name if it computes whole graphs. Raises `UnknownBackend`."""
    try:
        backend = get_backend(name)
    except UnknownBackend:
        raise
    except BackendUnavailable:
        return None  # a stranger's that cannot be imported
    return backend if isinstance(backend, GraphBackend) else None


def _metadata(folder: GenaiFolder) -> dict[str, Any]:
    model = folder.model
    said: dict[str, Any] = {
        "general.architecture": folder.kind,
        "general.name": folder.path.resolve().name,
        f"{folder.kind}.context_length": model.n_context,
        f"{folder.kind}.block_count": len(model.layers),
        f"{folder.kind}.attention.head_count_kv": model.n_kv_heads,
        f"{folder.kind}.attention.key_length": model.head_dim,
        f"{folder.kind}.vocab_size": model.n_vocab,
        "genai.cache_type": model.cache_type,
        "genai.cache_in_place": model.cache_in_place,
    }
    plain = (bool, int, float, str)
    return said | {f"genai.search.{key}": v for key, v in folder.search.metadata.items() if isinstance(v, plain)}


def _fingerprint(path: Path, sizes: tuple[int, ...]) -> str:
    """Return a key of configuration, tokenizer and sizes."""
    digest = blake2b(digest_size=16)
    for name in (GENAI_CONFIG, *TEXT_FILES):
        digest.update(name.encode() + b"\0")
        for chunk in chunks_of(path / name):
            digest.update(chunk)
    for n_bytes in sizes:
        digest.update(n_bytes.to_bytes(8, "little"))
    return digest.hexdigest()
