"""Threads: a few lanes that share out independent tasks, and the switch that keeps BLAS on one thread.

Knows no operation. NumPy drops the interpreter's lock inside large operations, so lanes compute side by side; BLAS
itself stays on one thread, because a product's bits would otherwise depend on how many threads there are.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgelm.errors import Cancelled


class Lanes:
    """`n` threads, the caller's among them, of which `active` work.

    `aborted` makes every running and later task raise `Cancelled`.
    """

    def __init__(self, n: int) -> None:
        self.n = self.active = n
        self.aborted = False
        self._pool = ThreadPoolExecutor(n - 1, "edgelm-lane") if n > 1 else None

    def check(self) -> None:
        if self.aborted:
            raise Cancelled("the computation was stopped; start it again to go on")

    def each(self, n_tasks: int, work: Callable[[int, int], None]) -> None:
        """Call `work(task, lane)` for every task; two tasks with the same lane never run at the same time."""
        tasks = itertools.count()

        def drain(lane: int) -> None:
            with quiet():
                while (task := next(tasks)) < n_tasks:
                    self.check()
                    work(task, lane)

        pool, extra = self._pool, min(self.active, n_tasks) - 1
        others = [pool.submit(drain, lane) for lane in range(1, extra + 1)] if pool else []
        try:
            drain(0)
        finally:
            errors = [other.exception() for other in others]
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def quiet() -> np.errstate:
    """Overflow to infinity is an answer here, not a mistake: exp(-x) in silu, or a broken scale in a file."""
    return np.errstate(over="ignore", invalid="ignore")


class BlasThreads:
    """Keeps the OpenBLAS inside NumPy on one thread, for the whole process, while anybody holds it.

    With another BLAS (`found` is False) nothing can be set here: limit it by its own environment variable.
    """

    _lock = threading.Lock()
    _n_holders = 0
    _n_before = 0

    def __init__(self) -> None:
        library = _numpy_library()
        for prefix, suffix in itertools.product(("scipy_openblas", "openblas"), ("64_", "")):
            self._get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
            self._set = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
            if self.found:
                return

    @property
    def found(self) -> bool:
        return self._get is not None and self._set is not None

    @property
    def n(self) -> int | None:
        """How many threads OpenBLAS uses now."""
        return None if self._get is None else int(self._get())

    def set(self, n: int) -> None:
        if self._set is not None:
            self._set(n)

    def hold(self) -> None:
        """Go down to one thread. Pairs with `release`; sessions may overlap."""
        cls = type(self)
        with cls._lock:
            if cls._n_holders == 0:
                cls._n_before = self.n or 0
                self.set(1)
            cls._n_holders += 1

    def release(self) -> None:
        cls = type(self)
        with cls._lock:
            cls._n_holders -= 1
            if cls._n_holders == 0:
                self.set(cls._n_before)


def _numpy_library() -> ctypes.CDLL:
    # Symbols are looked up in a library's dependencies too, so this finds the BLAS that NumPy itself is linked to.
    core = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
    return ctypes.CDLL(str(importlib.import_module(f"{core}._multiarray_umath").__file__))
