"""Make a low-bit copy of a model, to draft for it: a GGUF file in the cache folder.

A draft only guesses, so that nothing is lost but guesses. Weights pass through a few rows of memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from edgelm.engine.architecture import record
from edgelm.engine.backend import Rounding
from edgelm.engine.demand import describe
from edgelm.engine.health import check
from edgelm.engine.loading import default_context, open_path
from edgelm.engine.registry import backend_names, get_architecture, get_backend
from edgelm.errors import BackendUnavailable, ConfigError, PreparationError
from edgelm.files import drafts
from edgelm.files.copied_header import copied_header
from edgelm.files.errors import NotAModelFile
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.index import is_folder, is_genai_folder
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.files.writing import free_bytes, remove_leftovers, whole_or_nothing
from edgelm.memory.buffer import PAGE, Buffer
from edgelm.memory.stores import Store, open_store, span
from edgelm.memory.verified import verified
from edgelm.sizes import human

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rounder = Callable[[NDArray[np.float32]], NDArray[np.uint8]]

DEFAULT_TYPE = "Q4_0"
"""The type that every backend computes and NumPy rounds to; matrices whose rows do not divide by the block of another
type are of this one, too."""
WORTH = 0.85
"""How large a copy may be beside its model: a larger one would take its memory for nothing."""
_ALIGNMENT = 32
_STEP_WEIGHTS = 1 << 18
_DROPPED = ("general.alignment", "general.file_type", "split.", "edgelm.")


class DraftCopy(NamedTuple):
    """A low-bit copy: `made` is False if it was there already."""

    path: Path
    source: Path
    type: str
    size_bytes: int
    source_bytes: int
    made: bool


def draft_copy(
    path: str | os.PathLike[str],
    type: str = DEFAULT_TYPE,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> DraftCopy:
    """Make a copy of the GGUF model at `path` in few bits, in the cache folder; `load(..., draft="auto")` finds it.

    `type` is Q4_0, or one that an installed library rounds to (with llama.cpp's: Q2_K, Q3_K, IQ4_NL and more).
    Matrices whose rows do not divide by its blocks are Q4_0; what has fewer bits already stays as it is.
    `progress(done, total)` hears of bytes of the model.

    Raises `ConfigError` for a type that cannot be made or makes the model little smaller, `PreparationError` where the
    copy cannot be written, and what `load` raises for a model that is damaged or cannot be run.
    """
    if is_folder(path) or is_genai_folder(path):
        raise NotAModelFile(
            path, "copies are made of GGUF files", "convert the folder, or name a smaller model to draft"
        )
    source = open_path(path)
    kind = _type_of(type)
    target = drafts.path_of(source, kind.name)
    tensors = _planned(source, kind)
    if all(info.type != kind for info in tensors):
        raise ConfigError(
            f"{source.name} has no matrix that {kind.name} would make smaller (rows of whole blocks of "
            f"{kind.block_size}, of more bits than that); take another type, or a smaller model of the same family"
        )
    header = copied_header(source.paths[0], tensors, {drafts.OF_KEY: source.paths[0].name}, _DROPPED)
    size = _aligned(len(header)) + tensors[-1].offset + _aligned(tensors[-1].n_bytes)
    total = sum(source.file_bytes)
    if size > WORTH * total:
        raise ConfigError(
            f"a copy of {source.name} in {kind.name} would take {human(size)} of its {human(total)}: too much for a "
            "draft; name a type of fewer bits (--type Q2_K), or a smaller model of the same family"
        )
    if made := not target.exists():
        rounders = {one: _rounder(one) for one in {info.type for info in _changed(source, tensors)}}
        try:
            drafts.folder().mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, target.name)
            if (free := free_bytes(drafts.folder())) < size:
                raise PreparationError(
                    f"the copy takes {human(size)}, and {human(free)} are free in {drafts.folder()}; make room, or set "
                    "EDGELM_CACHE to a folder on another disk"
                )
            with whole_or_nothing(target) as file:
                _write(file, header, source, tensors, rounders, progress)
        except OSError as error:
            raise PreparationError(
                f"{target}: the copy cannot be written ({error.strerror or error}); make room, or set EDGELM_CACHE to "
                "another folder"
            ) from error
    return DraftCopy(target, source.paths[0], kind.name, target.stat().st_size, total, made)


def _type_of(name: str) -> TensorType:
    try:
        kind = TensorType[name.upper()]
    except KeyError:
        kind = None
    if kind is None or kind.affine is not None or kind.block_size == 1:
        raise ConfigError(
            f"{name!r} is no type of few bits; take Q4_0, or with llama.cpp's library Q2_K, Q3_K or IQ4_NL"
        )
    return kind


def _planned(source: ModelFile, kind: TensorType) -> list[TensorInfo]:
    """Return the tensors of the copy, placed from 0 on. Raises `UnsupportedModel` for a model that cannot be run."""
    model = describe(record(get_architecture(source.architecture), source, default_context(source)), source.tensors)
    matrices = {info.name for info in (model.embedding, *model.matrices) if info.n_rows > 1}
    kinds = [_kind_of(info, kind) if info.name in matrices else info.type for info in source.tensors.values()]
    sizes = [
        info.n_rows * row_bytes(one, info.shape[0]) for info, one in zip(source.tensors.values(), kinds, strict=True)
    ]
    starts = [0, *accumulate(map(_aligned, sizes))][:-1]
    return [
        TensorInfo(info.name, one, info.shape, 0, start, n_bytes)
        for info, one, start, n_bytes in zip(source.tensors.values(), kinds, starts, sizes, strict=True)
    ]


def _kind_of(info: TensorInfo, wanted: TensorType) -> TensorType:
    """Return the type of a matrix in the copy: rows must be whole blocks, and shorter than they were."""
    width = info.shape[0]
    kind = wanted if width % wanted.block_size == 0 else TensorType[DEFAULT_TYPE]
    fits = width % kind.block_size == 0 and row_bytes(kind, width) < row_bytes(info.type, width)
    return kind if fits else info.type


def _changed(source: ModelFile, tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    return [info for info in tensors if info.type != source.tensors[info.name].type]


def _rounder(kind: TensorType) -> Rounder:
    """Return what rounds rows to this type. Raises `ConfigError` if nothing here does."""
    if kind is TensorType.Q4_0:
        from edgelm.files.quantize import to_q4_0

        return to_q4_0
    for name in backend_names():
        try:
            backend = get_backend(name)
            if isinstance(backend, Rounding) and check(name).available:
                found = backend.rounding(kind)
                if found is not None:
                    return found
        except BackendUnavailable:
            continue
    raise ConfigError(
        f"nothing here rounds weights to {kind.name}; take Q4_0, or one of Q2_K, Q3_K and IQ4_NL where llama.cpp's "
        "library is installed (pip install 'edgelm[llamacpp]')"
    )


def _write(
    file: BinaryIO,
    header: bytes,
    source: ModelFile,
    tensors: Sequence[TensorInfo],
    rounders: dict[TensorType, Rounder],
    progress: Callable[[int, int], None] | None,
) -> None:
    file.write(header + bytes(_aligned(len(header)) - len(header)))
    done, total = 0, source.total_tensor_bytes
    plain, _ = open_store([str(path) for path in source.paths])
    store = verified(plain, source)
    steps = {info.name: _rows_at_once(info) for info in source.tensors.values()}
    largest = max(min(steps[info.name], info.n_rows) * info.row_bytes for info in source.tensors.values())
    try:
        with Buffer(span(PAGE - 1, largest)) as buffer:
            for made in tensors:
                info = source.tensors[made.name]
                for first in range(0, info.n_rows, steps[info.name]):
                    n_rows = min(steps[info.name], info.n_rows - first)
                    file.write(_rows(store, buffer, info, first, n_rows, rounders, made.type))
                    done += n_rows * info.row_bytes
                    if progress is not None:
                        progress(done, total)
                file.write(bytes(_aligned(made.n_bytes) - made.n_bytes))
    finally:
        store.close()


def _rows(
    store: Store,
    buffer: Buffer,
    info: TensorInfo,
    first: int,
    n_rows: int,
    rounders: dict[TensorType, Rounder],
    kind: TensorType,
) -> bytes:
    """Return some rows of a tensor in the type that they have in the copy."""
    import numpy as np

    from edgelm.files.blocks import dequantize

    n_bytes = n_rows * info.row_bytes
    at = store.read_into(info.file, info.offset + first * info.row_bytes, n_bytes, buffer.view, 0)
    with buffer.view[at : at + n_bytes] as raw:
        if kind == info.type:
            return bytes(raw)
        numbers = dequantize(info.type, np.frombuffer(raw, np.uint8).reshape(n_rows, -1))
    with np.errstate(all="ignore"):  # numbers that are none, or too large, are the model's own affair
        return rounders[kind](numbers).tobytes()


def _rows_at_once(info: TensorInfo) -> int:
    """Return how many rows pass through memory together: whole tiles of the source's checksums."""
    step = info.row_step
    return max(_STEP_WEIGHTS // (info.shape[0] * step), 1) * step


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
