"""ONNX Runtime as edgelm uses it: sessions of small graphs, one pool of threads, buffers bound by address.

Only the extension module is imported: the package around it costs more to import than the rest of a start. Knows no
model, no layout and no operator.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import BackendUnavailable

NAME = "onnx"
MODULE = "onnxruntime_pybind11_state"
_ERRORS_ONLY = 3
ARENA_BYTES = 32 << 20
"""Address space that runs allocate from; memory is taken where it is first written. It grows by doubling."""
ARENA_SHARE = 32
"""One part in so many of it is the arena's own table, which is written at once."""
_arena = False
_pool: int | None = None
"""Threads of the pool that all sessions of the process share: ONNX Runtime allows one pool, made once."""


def folder() -> Path | None:
    """Return where the extension module of ONNX Runtime lies; imports nothing."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        brought = Path(sys.prefix, "onnxruntime", "capi")  # frozen applications: the library without the package
        return brought if getattr(sys, "frozen", False) and brought.is_dir() else None
    return Path(next(iter(spec.submodule_search_locations))) / "capi"


def installed() -> str:
    """Return what changes with the installed library; imports nothing."""
    home = folder()
    facts = [(path.name, path.stat()) for path in sorted(home.glob(f"{MODULE}*"))] if home else []
    return f"{home} " + " ".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in facts)


def library() -> Any:
    """Return the extension module. Raises `BackendUnavailable`."""
    loaded = sys.modules.get(f"onnxruntime.capi.{MODULE}")
    if loaded is not None:
        return loaded
    home = folder()
    if home is None:
        raise BackendUnavailable(NAME, "onnxruntime is not installed", "install it with: pip install onnxruntime")
    try:
        return _load_alone(home)
    except ImportError as exc:
        raise BackendUnavailable(
            NAME, str(exc), "install it again with: pip install --force-reinstall onnxruntime"
        ) from exc


def _load_alone(home: Path) -> Any:
    """Load the extension module without the package's own start-up code, under the name that the package gives it."""
    from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
    from importlib.util import module_from_spec, spec_from_file_location

    for suffix in EXTENSION_SUFFIXES:
        path = home / f"{MODULE}{suffix}"
        if path.exists():
            name = f"onnxruntime.capi.{MODULE}"
            spec = spec_from_file_location(name, path, loader=ExtensionFileLoader(name, str(path)))
            assert spec is not None
            assert spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[name] = module
            return module
    raise ImportError(f"onnxruntime in {home} has no module {MODULE} for this Python")


def version() -> str:
    return str(library().get_version_string())


def use_pool(n_threads: int) -> None:
    """Let all sessions from now on share `n_threads` threads. The first call with more than one decides."""
    global _pool
    if _pool is not None or n_threads < 2:
        return
    with suppress(RuntimeError):  # another user of ONNX Runtime in this process has made the pool
        library().set_global_thread_pool_sizes(n_threads, 1)
    _pool = n_threads


def set_threads(options: Any, n_threads: int) -> None:
    """Give a session threads of its own, unless the process has a pool: then ONNX Runtime allows nothing else."""
    if _pool is None:
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
    else:
        options.use_per_session_threads = False


def use_arena() -> None:
    """Let sessions made from now on share memory for what they allocate while they run, and keep it."""
    global _arena
    if _arena:
        return
    lib = library()
    where = lib.OrtMemoryInfo("Cpu", lib.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, lib.OrtMemType.DEFAULT)
    settings = lib.OrtArenaCfg({"arena_extend_strategy": 0, "initial_chunk_size_bytes": ARENA_BYTES})
    lib.create_and_register_allocator(where, settings)
    _arena = True


class Graph:
    """A session of one graph. `stands` are constants that are not in the model: they are kept alive, not copied."""

    def __init__(self, model: bytes, stands: Mapping[str, NDArray[np.generic]]) -> None:
        lib = library()
        options = lib.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = lib.GraphOptimizationLevel.ORT_DISABLE_ALL  # graphs come as they shall run
        if _arena:
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        else:
            options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        set_threads(options, 1)
        self._device = device = lib.OrtDevice(lib.OrtDevice.cpu(), lib.OrtDevice.default_memory(), 0)
        self._values = [_Value(lib.OrtValue.ortvalue_from_numpy(array, device)) for array in stands.values()]
        self._arrays = list(stands.values())
        if stands:
            options.add_external_initializers(list(stands), self._values)
        self.session = lib.InferenceSession(options, model, False, False)
        self.session.initialize_session(["CPUExecutionProvider"], [{}], set())
        self._lib = lib

    def run(self, binding: Binding) -> None:
        """Compute. Programs call `session` themselves, to be able to break a run off."""
        self.session.run_with_iobinding(binding.raw, self._lib.RunOptions())

    def binding(self) -> Binding:
        return Binding(self._lib.SessionIOBinding(self.session), self._device)


class _Value:
    """What the extension module takes for a value: the package's class of Python has this attribute."""

    __slots__ = ("_ortvalue",)

    def __init__(self, value: Any) -> None:
        self._ortvalue = value


class Binding:
    """Addresses of the inputs and outputs of a graph."""

    def __init__(self, binding: Any, device: Any) -> None:
        self.raw, self._device = binding, device

    def take(self, slots: Iterable[tuple[bool, str, Any, tuple[int, ...], int]]) -> None:
        """Bind inputs (True) and outputs: by name, element type, shape and address."""
        raw, device = self.raw, self._device
        for is_input, name, element, shape, address in slots:
            (raw.bind_input if is_input else raw.bind_output)(name, device, element, shape, address)
