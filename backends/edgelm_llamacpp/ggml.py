"""ggml's C interface, as far as edgelm uses it: where the library is, which functions, and one probed offset.

`libggml-base` and `libggml-cpu` are called through ctypes. No structure is mirrored but `ggml_init_params`; the place
of `ggml_tensor.data` is found by a scan, and a library where the scan fails is refused.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgelm.errors import BackendUnavailable

NAME = "llamacpp"
HINT = (
    "install it with: pip install 'edgelm[llamacpp]' (compiles for some minutes, needs a C++ compiler), or "
    "pip install 'edgelm[ggml]' (ready-made, Linux)"
)

STATUS_SUCCESS, STATUS_ABORTED = 0, 1
TYPE_F32, TYPE_F16, TYPE_I32, TYPE_I64 = 0, 1, 26, 27
ROPE_NORMAL, ROPE_NEOX = 0, 2
STRUCT_BYTES = 1024  # more than any ggml_tensor or parameter block seen; the scan stays inside the context's memory

_P, _I64, _F, _I, _Z = c_void_p, c_int64, c_float, c_int, c_size_t
_BASE: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_free": (None, (_P,)),
    "ggml_tensor_overhead": (_Z, ()),
    "ggml_graph_overhead_custom": (_Z, (_Z, c_bool)),
    "ggml_new_graph_custom": (_P, (_P, _Z, c_bool)),
    "ggml_build_forward_expand": (None, (_P, _P)),
    "ggml_new_tensor_1d": (_P, (_P, _I, _I64)),
    "ggml_new_tensor_2d": (_P, (_P, _I, _I64, _I64)),
    "ggml_new_tensor_3d": (_P, (_P, _I, _I64, _I64, _I64)),
    "ggml_reshape_2d": (_P, (_P, _P, _I64, _I64)),
    "ggml_reshape_3d": (_P, (_P, _P, _I64, _I64, _I64)),
    "ggml_reshape_4d": (_P, (_P, _P, _I64, _I64, _I64, _I64)),
    "ggml_view_2d": (_P, (_P, _P, _I64, _I64, _Z, _Z)),
    "ggml_view_3d": (_P, (_P, _P, _I64, _I64, _I64, _Z, _Z, _Z)),
    "ggml_permute": (_P, (_P, _P, _I, _I, _I, _I)),
    "ggml_cont": (_P, (_P, _P)),
    "ggml_cont_2d": (_P, (_P, _P, _I64, _I64)),
    "ggml_get_rows": (_P, (_P, _P, _P)),
    "ggml_set_rows": (_P, (_P, _P, _P, _P)),
    "ggml_add": (_P, (_P, _P, _P)),
    "ggml_sub": (_P, (_P, _P, _P)),
    "ggml_mul": (_P, (_P, _P, _P)),
    "ggml_abs": (_P, (_P, _P)),
    "ggml_step": (_P, (_P, _P)),
    "ggml_arange": (_P, (_P, _F, _F, _F)),
    "ggml_repeat": (_P, (_P, _P, _P)),
    "ggml_mul_mat": (_P, (_P, _P, _P)),
    "ggml_rms_norm": (_P, (_P, _P, _F)),
    "ggml_norm": (_P, (_P, _P, _F)),
    "ggml_gelu": (_P, (_P, _P)),
    "ggml_silu": (_P, (_P, _P)),
    "ggml_scale": (_P, (_P, _P, _F)),
    "ggml_tanh": (_P, (_P, _P)),
    "ggml_concat": (_P, (_P, _P, _P, _I)),
    "ggml_swiglu_split": (_P, (_P, _P, _P)),
    "ggml_geglu_split": (_P, (_P, _P, _P)),
    "ggml_soft_max_ext": (_P, (_P, _P, _P, _F, _F)),
    "ggml_cast": (_P, (_P, _P, _I)),
    "ggml_flash_attn_ext": (_P, (_P, _P, _P, _P, _P, _F, _F, _F)),
    "ggml_rope_ext": (_P, (_P, _P, _P, _P, _I, _I, _I, _F, _F, _F, _F, _F, _F)),
    "ggml_gallocr_new": (_P, (_P,)),
    "ggml_gallocr_free": (None, (_P,)),
    "ggml_gallocr_reserve": (c_bool, (_P, _P)),
    "ggml_gallocr_reserve_n_size": (None, (_P, _P, _P, _P, _P)),
    "ggml_gallocr_alloc_graph": (c_bool, (_P, _P)),
    "ggml_gallocr_get_buffer_size": (_Z, (_P, _I)),
    "ggml_backend_cpu_buffer_type": (_P, ()),
    "ggml_backend_cpu_buffer_from_ptr": (_P, (_P, _Z)),
    "ggml_backend_buffer_free": (None, (_P,)),
    "ggml_backend_tensor_alloc": (_I, (_P, _P, _P)),
    "ggml_backend_free": (None, (_P,)),
    "ggml_threadpool_params_init": (None, (_P, _I)),
}
_CPU: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_backend_cpu_init": (_P, ()),
    "ggml_backend_cpu_set_n_threads": (None, (_P, _I)),
    "ggml_backend_cpu_set_threadpool": (None, (_P, _P)),
    "ggml_backend_cpu_set_abort_callback": (None, (_P, _P, _P)),
    "ggml_threadpool_new": (_P, (_P,)),
    "ggml_threadpool_free": (None, (_P,)),
    "ggml_threadpool_pause": (None, (_P,)),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(ctypes.Structure):
    # only the first field of ggml_cplan is read; the rest is room for the callee, returned through memory
    _fields_ = (("work_size", c_size_t), ("rest", ctypes.c_char * 248))


class Ggml:
    """The loaded library: every function of the tables above as an attribute, and `data_offset`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # PyDLL keeps the interpreter lock: building a graph is thousands of calls of under a microsecond
        base = open_library(ctypes.PyDLL, folder, "ggml-base")
        cpu = open_library(ctypes.PyDLL, folder, "ggml-cpu")
        for library, table in ((base, _BASE), (cpu, _CPU)):
            for name, (result, arguments) in table.items():
                setattr(self, name, function(library, name, result, arguments))
        self._init = function(base, "ggml_init", c_void_p, (_InitParams,))
        self._plan = function(cpu, "ggml_graph_plan", _Plan, (c_void_p, c_int, c_void_p))
        self.version: str = _version(base)
        # CDLL releases it: reader threads run beside the computation
        freeing = open_library(ctypes.CDLL, folder, "ggml-base")
        self.compute = function(freeing, "ggml_backend_graph_compute", c_int, (_P, _P))
        self.tensor_bytes: int = self.ggml_tensor_overhead()
        self.data_offset = self._find_data_offset()

    def __getattr__(self, name: str) -> Any:  # the attributes set in __init__, for type checkers
        raise AttributeError(name)

    def context(self, n_tensors: int, graph_size: int) -> int:
        """Return a context with room for tensors and one graph, no data."""
        n_bytes = self.tensor_bytes * (n_tensors + 1) + self.ggml_graph_overhead_custom(graph_size, False)
        context = self._init(_InitParams(n_bytes, None, True))
        if not context:
            raise MemoryError(f"ggml has no room for {n_tensors} tensors")
        return int(context)

    def work_bytes(self, graph: int, n_threads: int) -> int:
        """Bytes that the library allocates for itself while it computes the graph."""
        return int(self._plan(graph, n_threads, None).work_size)

    def pointer(self, tensor: int) -> c_void_p:
        """Return `tensor->data` as a variable that can be read and written."""
        return c_void_p.from_address(tensor + self.data_offset)

    def _find_data_offset(self) -> int:
        context = self.context(2, 8)
        memory = ctypes.create_string_buffer(8192)
        base = (ctypes.addressof(memory) + 63) & ~63
        buffer = self.ggml_backend_cpu_buffer_from_ptr(base, 4096)
        found = set(range(0, self.tensor_bytes - 7, 8))
        try:
            for address in (base, base + 2048):  # two tensors: stale memory cannot hold both addresses in one place
                tensor = self.ggml_new_tensor_1d(context, TYPE_F32, 16)
                if self.ggml_backend_tensor_alloc(buffer, tensor, address) != STATUS_SUCCESS:
                    raise BackendUnavailable(NAME, f"the ggml in {self.folder} refuses memory of ours", HINT)
                found &= {offset for offset in found if c_size_t.from_address(tensor + offset).value == address}
        finally:
            self.ggml_backend_buffer_free(buffer)
            self.ggml_free(context)
        if len(found) != 1:
            raise BackendUnavailable(
                NAME, f"the ggml in {self.folder} lays tensors out in an unknown way ({len(found)} candidates)", HINT
            )
        return found.pop()


def load() -> Ggml:
    """Return the first ggml found. Raises `BackendUnavailable` with the folders that were searched."""
    searched: list[str] = []
    problem = "no ggml library was found"
    for folder in _folders():
        searched.append(str(folder))
        if not any(folder.glob("*ggml-cpu*")):
            continue
        try:
            return Ggml(folder)
        except (OSError, AttributeError) as exc:
            problem = f"the ggml in {folder} cannot be used ({exc})"
    raise BackendUnavailable(NAME, f"{problem} (searched: {', '.join(searched) or 'nothing installed'})", HINT)


def identity() -> str:
    """Return paths, sizes and times of change of the ggml files that `load` would try, loading none."""
    return "\n".join(
        f"{path} {facts.st_size} {facts.st_mtime_ns}"
        for folder in _folders()
        for path in sorted(folder.glob("*ggml*"))
        if (facts := path.stat())
    )


def _folders() -> Iterator[Path]:
    if chosen := os.environ.get("EDGELM_GGML"):
        yield Path(chosen)
        return
    for package in ("llama_cpp", "llama_cpp_py_sync", "libggml"):  # what was compiled here goes before what was not
        spec = find_spec(package)  # finds the folder without importing the package
        # a frozen application brings the libraries along, but not the package
        elsewhere = [os.path.join(sys.prefix, package)] if getattr(sys, "frozen", False) else []
        for place in (spec.submodule_search_locations if spec else None) or elsewhere:
            yield from (Path(place) / "lib", Path(place) / "lib64", Path(place))
    yield from map(Path, ("/opt/homebrew/lib", "/usr/local/lib", "/usr/lib"))


def open_library(loader: Any, folder: Path, name: str) -> Any:
    """Return the library of this name (without "lib" and ending) in a folder. Raises `OSError` if it is not there."""
    patterns = {"darwin": (f"lib{name}.dylib", f"lib{name}.*.dylib"), "win32": (f"{name}.dll", f"lib{name}.dll")}
    for pattern in patterns.get(sys.platform, (f"lib{name}.so", f"lib{name}.so.*", f"lib{name}-*.so")):
        for path in sorted(folder.glob(pattern)):
            return loader(str(path))
    raise OSError(f"{name} is missing")


def function(library: Any, name: str, result: Any, arguments: tuple[Any, ...]) -> Any:
    """Return a function of a library with its types set. Raises `AttributeError` if the library has none so called."""
    function = getattr(library, name)
    function.restype, function.argtypes = result, arguments
    return function


def _version(base: Any) -> str:
    try:
        return f"ggml {(function(base, 'ggml_version', c_char_p, ())() or b'').decode()}"
    except AttributeError:  # before 0.9 it does not say
        return "ggml of unknown version"
