"""Where backends and architectures are found: a table of the built-ins, and entry points for everybody's.

Holds strings and hints; imports a backend or an architecture when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgelm.engine.entries import entries
from edgelm.engine.machine import file_facts
from edgelm.errors import BackendUnavailable, UnknownBackend, UnsupportedModel

if TYPE_CHECKING:  # a child process that tries a backend has no use for NumPy
    from edgelm.engine.architecture import Architecture
    from edgelm.engine.backend import Backend

# The same entries stand in pyproject.toml; this table serves frozen applications, which lose their metadata.
BACKENDS: Mapping[str, str] = {
    "llamacpp": "edgelm_llamacpp:BACKEND",
    "mlx": "edgelm_mlx:BACKEND",
    "numpy": "edgelm_numpy:BACKEND",
    "onnx": "edgelm_onnx:BACKEND",
    "npu": "edgelm_npu:BACKEND",
}
ARCHITECTURES: Mapping[str, str] = {
    name: f"edgelm_models.{name}"
    for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "granite", "olmo2", "bert")
} | {"nomic-bert": "edgelm_models.nomic_bert", "gemma-embedding": "edgelm_models.gemma_embedding"}
HINTS: Mapping[str, str] = {
    "onnx": "install it with: pip install onnxruntime",
    "llamacpp": "install it with: pip install 'edgelm[llamacpp]' (compiles for some minutes, needs a C++ compiler), or "
    "pip install 'edgelm[ggml]' (ready-made, Linux)",
    "mlx": "install it with: pip install 'edgelm[mlx]'",
}


def backend_names() -> tuple[str, ...]:
    """Return the names of all registered backends, built-ins first."""
    return tuple(dict.fromkeys((*BACKENDS, *entries("edgelm.backends"))))


def origin(name: str) -> str:
    """Return what a backend's name stands for and the facts of that package's file, importing nothing.

    Raises `UnknownBackend`.
    """
    target = _target(name)
    try:
        spec = find_spec(target.partition(":")[0].partition(".")[0])
    except ValueError:  # a module of that name has none
        spec = None
    return f"{target} {file_facts(Path(spec.origin))}" if spec is not None and spec.origin else target


def get_backend(name: str) -> Backend:
    """Return the backend of this name. Raises `UnknownBackend`, or `BackendUnavailable` if it cannot be imported."""
    target = _target(name)
    try:
        return cast("Backend", _load(target))
    except ImportError as exc:
        raise BackendUnavailable(name, str(exc), HINTS.get(name, f"check {target}")) from exc


def architecture_names() -> tuple[str, ...]:
    """Return the names of all registered architectures, built-ins first."""
    return tuple(dict.fromkeys((*ARCHITECTURES, *entries("edgelm.architectures"))))


def get_architecture(name: str) -> Architecture:
    """Return the architecture of this name. Raises `UnsupportedModel`."""
    target = ARCHITECTURES.get(name) or entries("edgelm.architectures").get(name)
    if target is None:
        raise UnsupportedModel(
            f"architecture {name!r} is not supported (supported: {', '.join(sorted(ARCHITECTURES))}); "
            "try a model of one of these families"
        )
    return cast("Architecture", _load(target))


def _target(name: str) -> str:
    target = BACKENDS.get(name) or entries("edgelm.backends").get(name)
    if target is None:
        raise UnknownBackend(name, backend_names())
    return target


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    loaded = import_module(module)
    return getattr(loaded, attribute) if attribute else loaded
