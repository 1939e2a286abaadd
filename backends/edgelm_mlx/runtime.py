"""Find MLX, load it, say whether it computes. Knows no operation of a model."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import BackendUnavailable

Array = Any
"""An `mlx.core.array`."""
INSTALL = "pip install 'edgelm[mlx]'"
RUNNING = Lock()
"""Held while a program runs: a stream of MLX may be used from any thread, but from one at a time."""


@cache
def load() -> Any:
    """Return the module mlx.core. Raises `BackendUnavailable`."""
    try:
        mx: Any = import_module("mlx.core")
    except ImportError as exc:
        if find_spec("mlx") is None:
            raise BackendUnavailable("mlx", f"MLX is not installed; install it with: {INSTALL}") from exc
        # the package mlx alone is a shell on Linux: the library comes with mlx[cpu]
        shell = f"MLX is installed but does not load ({exc}); on Linux install it with: pip install 'mlx[cpu]'"
        raise BackendUnavailable("mlx", shell) from exc
    if not hasattr(mx, "new_thread_unsafe_stream"):
        raise BackendUnavailable("mlx", f"MLX {mx.__version__} is too old, 0.32 is needed: {INSTALL} --upgrade")
    return mx


def device() -> str:
    """Return "gpu" or "cpu": what MLX computes on."""
    mx = load()
    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


@cache
def stream(kind: str) -> Any:
    """Return the one stream of a device that edgelm uses: MLX keeps a thread for every stream there ever was."""
    mx = load()
    return mx.new_thread_unsafe_stream(getattr(mx, kind))


def empty(shape: tuple[int, ...], dtype: str) -> tuple[Array, NDArray[Any]]:
    """Return a new array and a view of its memory to write to. It is made on the CPU: nobody waits for a GPU."""
    mx = load()
    array = mx.zeros(shape, getattr(mx, dtype), stream=stream("cpu"))
    return array, np.array(array, copy=False)


def check() -> str:
    """Return version and device of an MLX that multiplies correctly. Raises `BackendUnavailable`."""
    mx = load()
    with RUNNING, mx.stream(stream(device())):
        x = mx.arange(64, dtype=mx.float32).reshape(2, 32)
        words = mx.full((1, 4), 0x11111111, dtype=mx.uint32)  # 32 quants of four bits, all 1
        one, half = mx.ones((1, 1)), mx.full((1, 1), 0.5)
        product = mx.quantized_matmul(x, words, one, half, transpose=True, group_size=32, bits=4)
        found = product.reshape(2).tolist()
    if found != [1.5 * sum(range(32)), 1.5 * sum(range(32, 64))]:
        raise BackendUnavailable("mlx", f"MLX {mx.__version__} computes wrong results here; install it again")
    return f"MLX {mx.__version__} on the {device().upper()}"


def identity() -> str:
    """Return paths, sizes and times of change of MLX's libraries, loading none."""
    spec = find_spec("mlx")
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    return "\n".join(
        f"{path} {facts.st_size} {facts.st_mtime_ns}"
        for folder in folders
        for pattern in ("core*", "lib/libmlx*", "lib/*.metallib")
        for path in sorted(folder.glob(pattern))
        if (facts := os.stat(path))
    )
