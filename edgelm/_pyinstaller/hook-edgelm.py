"""edgelm in a frozen application: its modules and data, the architectures, and every backend with its library.

The backends look for their libraries themselves and run none of the Python code around them, so that code stays out
with all that it would import. What is not installed is left out; `EDGELM_FREEZE=numpy,llamacpp` names the backends that
are to come along, without it all do but `npu`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

from edgelm.engine.registry import ARCHITECTURES, BACKENDS

LIBRARIES = {
    "llamacpp": [("llama_cpp", "lib", "*"), ("llama_cpp_py_sync", "", "*ggml*")],
    "mlx": [("mlx", "", "core*"), ("mlx", "lib", "*")],
    "onnx": [
        ("onnxruntime", "capi", "onnxruntime_pybind11_state*"),
        ("onnxruntime", "capi", "*onnxruntime_providers_shared*"),
    ],
}
"""Package, folder in it, and files: where `edgelm_llamacpp.ggml`, `edgelm_onnx.runtime` and MLX itself look."""


def _libraries(backend: str) -> list[tuple[str, str]]:
    found = []
    for package, below, pattern in LIBRARIES.get(backend, []):
        spec = find_spec(package)
        for home in (spec.submodule_search_locations or ()) if spec else ():
            files = (path for path in Path(home, below).glob(pattern) if path.is_file())
            found += [(str(path), os.path.join(package, below)) for path in files]
    return found


_wanted = [name for name in os.environ.get("EDGELM_FREEZE", "").split(",") if name] or [
    name for name in BACKENDS if name != "npu"
]
datas = collect_data_files("edgelm")
binaries = [file for name in _wanted for file in _libraries(name)]
hiddenimports = collect_submodules(
    "edgelm", filter=lambda name: name.partition(".")[2].partition(".")[0] not in ("_pyinstaller", "testing")
)
hiddenimports += ARCHITECTURES.values()
for _name in dict.fromkeys([*_wanted, "numpy"]):
    hiddenimports += collect_submodules(BACKENDS[_name].partition(":")[0])
if "mlx" in _wanted and find_spec("mlx") is not None:
    hiddenimports += ["mlx.core", "mlx._reprlib_fix", "mlx.__array_api_info"]  # what the first imports
