"""What a model file says about itself, which backends work here, and what this device is.

Gathers facts for people and programs; decides nothing and changes nothing but caches and one temporary file.
"""

from __future__ import annotations

import os
import platform as python_platform
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import edgelm
from edgelm.cachedir import cache_dir
from edgelm.engine.health import check
from edgelm.engine.loading import open_path
from edgelm.engine.machine import cpu_model
from edgelm.engine.reading import known, measure
from edgelm.engine.registry import HINTS, backend_names, get_backend
from edgelm.errors import EdgeLMError
from edgelm.files.ggml_types import TensorType
from edgelm.files.gguf import open_model
from edgelm.files.index import is_folder, is_genai_folder
from edgelm.files.model import ModelFile
from edgelm.files.pack import VERSION_KEY, open_pack, refuse_lost_footer
from edgelm.files.strings import StringArray
from edgelm.memory.flash import ENOUGH_BYTES, Calibration
from edgelm.memory.platform import current_platform
from edgelm.sizes import MIB, human

_TRIAL_BYTES = 64 * MIB
_PATTERN_BYTES = 4 * MIB
_SHORT_ARRAY = 64
_COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor of a file. `shape` is in ggml's order: the length of a row first."""

    name: str
    type: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model file's header. `metadata` holds plain Python values; `template` is the chat template, if there is one."""

    path: str
    architecture: str
    metadata: Mapping[str, Any]
    tensors: tuple[TensorReport, ...]
    template: str | None


@dataclass(frozen=True, slots=True)
class BackendReport:
    """Whether a backend works here. `reason` says why not; `capabilities` is empty then.

    `broken`: it did not say so itself, but crashed, hung, or was caught at wrong answers when it was tried.
    """

    name: str
    version: str | None
    available: bool
    reason: str | None
    capabilities: Mapping[str, Any]
    broken: bool = False


def inspect(path: str | os.PathLike[str]) -> Inspection:
    """Read the header of a GGUF file (of a split model: the first part's path) or of a model folder; no weights.

    Raises `ModelNotFound`, `ModelFileError` or `UnsupportedModel`.
    """
    if is_genai_folder(path):
        return _inspect_graph(path)
    file = open_path(path) if is_folder(path) else open_model(path)
    if VERSION_KEY in file.metadata and open_pack(file.paths[0]) is None:
        refuse_lost_footer(file)
    tensors = (TensorReport(t.name, t.type.name, t.shape, t.n_bytes) for t in file.tensors.values())
    return _inspection(path, file, tuple(tensors))


def _inspect_graph(path: str | os.PathLike[str]) -> Inspection:
    """Show an ONNX graph's weights as the tensors of a file: the length of a row first, as ggml has it."""
    from edgelm.engine.graphs import open_genai

    file, folder = open_genai(Path(path))
    weights = folder.model.graph.weights.values()
    return _inspection(
        path, file, tuple(TensorReport(w.name, w.type, tuple(reversed(w.shape)), w.n_bytes) for w in weights)
    )


def _inspection(path: str | os.PathLike[str], file: ModelFile, tensors: tuple[TensorReport, ...]) -> Inspection:
    metadata = {key: _plain(value) for key, value in file.metadata.items()}
    template = metadata.get("tokenizer.chat_template")
    return Inspection(
        path=os.fspath(path),
        architecture=file.architecture,
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        template=template if isinstance(template, str) else None,
    )


def backends(*, recheck: bool = False) -> tuple[BackendReport, ...]:
    """Try every registered backend, or recall what came of it; `recheck` tries them all again."""
    return tuple(_report(name, recheck) for name in backend_names())


def doctor(path: str | os.PathLike[str] | None = None, *, recheck: bool = False) -> dict[str, Any]:
    """Describe this device as plain values: versions, processor, memory, backends, cache folder, flash.

    Flash is measured on the file at `path`, else on the largest model in the cache folder, else on 64 MB written there
    and removed again. Its table, and the trials of backends, are recalled if they are known; `recheck` repeats them.
    `warnings` are sentences, each with what to do. Sizes end in `_bytes`, durations in `_s`.
    """
    system = current_platform()
    reports = backends(recheck=recheck)
    memory = _memory()
    facts: dict[str, Any] = {
        "edgelm": edgelm.__version__,
        "python": python_platform.python_version(),
        "platform": python_platform.platform(),
        "cpu": cpu_model(),
        "cores": {"usable": system.cores(), "logical": os.cpu_count()},
        "memory": memory,
        "backends": {r.name: f"works ({r.version})" if r.available else f"does not work: {r.reason}" for r in reports},
        "cache": {"folder": str(cache_dir()), "size_bytes": _folder_bytes(cache_dir())},
    }
    try:
        facts["flash"] = _flash(Path(path) if path is not None else None, recheck)
    except (OSError, EdgeLMError) as exc:
        facts["flash"] = {"problem": str(exc)}
    facts["warnings"] = _warnings(facts, reports)
    return facts


def _type_name(kind: TensorType) -> str:
    """Return the name of a type; of affine ones only the bits."""
    return kind.name if kind.affine is None else f"AFFINE{kind.affine.bits}"


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # an array of numbers
        return tuple(value.tolist())
    # long ones, such as vocabularies, stay in the form that takes a tenth of the memory
    return tuple(value) if isinstance(value, StringArray) and len(value) <= _SHORT_ARRAY else value


def _report(name: str, recheck: bool) -> BackendReport:
    found = check(name, fresh=recheck)
    if not found.available:
        return BackendReport(name, found.version or None, False, found.reason, MappingProxyType({}), found.broken)
    can = get_backend(name).capabilities()
    capabilities: dict[str, Any] = {"simulated": True} if can.simulated else {}
    capabilities |= {"streams": can.streams, "tensor_types": tuple(sorted(set(map(_type_name, can.types))))}
    return BackendReport(name, found.version or None, True, None, MappingProxyType(capabilities))


def _memory() -> dict[str, Any]:
    system = current_platform()
    device, usable = _device_bytes(), system.total_bytes()
    facts = {"total_bytes": device, "available_bytes": system.available_bytes()}
    return facts | {"container_limit_bytes": usable} if usable < device else facts


def _device_bytes() -> int:
    """Return the memory of the device, whatever limits this process has."""
    if sys.platform == "win32":
        import psutil

        return psutil.virtual_memory().total
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _folder_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # removed meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def _flash(path: Path | None, recheck: bool) -> dict[str, Any]:
    if path is not None or (path := _model_at_hand()) is not None:
        return _reading((None if recheck else known(path)) or measure(path)) | {"measured_on": str(path)}
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / f"flash-{os.getpid()}-{time.monotonic_ns()}.tmp"
    try:
        pattern = os.urandom(_PATTERN_BYTES)  # not zeros: some file systems and drives store those for free
        with trial.open("xb", buffering=0) as file:
            file.write(pattern)
            found = None if recheck else known(trial)
            if found is None:
                for _ in range(_TRIAL_BYTES // _PATTERN_BYTES - 1):
                    file.write(pattern)
                os.fsync(file.fileno())
        return _reading(found or measure(trial)) | {"measured_on": f"{human(_TRIAL_BYTES)} in {folder}"}
    finally:
        with suppress(OSError):
            trial.unlink()


def _model_at_hand() -> Path | None:
    """Return the largest model in the cache folder, if it is large enough to be measured."""
    sizes = {path: path.stat().st_size for path in cache_dir().rglob("*.gguf") if path.is_file()}
    largest = max(sizes, key=sizes.__getitem__, default=None)
    return largest if largest is not None and sizes[largest] >= ENOUGH_BYTES else None


def _reading(found: Calibration) -> dict[str, Any]:
    best = found.pattern
    return {
        "read_bytes_per_s": best.bytes_per_s,
        "pattern": {"block_bytes": best.block_bytes, "n_parallel": best.n_parallel},
        "latency_s": best.latency_s,
        "cpu_s_per_gb": best.cpu_s_per_gb,
        "direct": best.direct,
        "how": f"page cache bypassed by {current_platform().direct_how}" if best.direct else best.how,
        "table": [asdict(turn) for turn in found.table],
    }


def _warnings(facts: Mapping[str, Any], reports: tuple[BackendReport, ...]) -> list[str]:
    found = []
    works = {report.name for report in reports if report.available}
    found += [
        f"{report.name} is not used: {report.reason}; reinstall or remove it, then run `edgelm doctor --recheck`"
        for report in reports
        if report.broken
    ]
    compilers = [name for name in _COMPILERS if shutil.which(name)]
    if "llamacpp" not in works:
        found.append(f"llamacpp, the fastest backend, does not work here; {HINTS['llamacpp']}")
        if not compilers:
            found.append(
                "no C++ compiler was found: llamacpp cannot be compiled before there is one; edgelm[ggml] needs none"
            )
    cores = facts["cores"]["usable"]
    if sys.platform != "win32" and os.getloadavg()[0] > cores:
        load = os.getloadavg()[0]
        found.append(f"the machine is busy (load {load:.1f} on {cores} cores): models run slower until that ends")
    if "problem" in facts["flash"]:
        problem = facts["flash"]["problem"]
        found.append(f"flash could not be measured ({problem}); set EDGELM_CACHE to a writable folder")
    elif not facts["flash"]["direct"]:
        found.append("this file system refuses direct reads: streaming is slower; keep models on another drive")
    return found
