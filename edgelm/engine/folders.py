"""A model folder of the Hugging Face or MLX kind as a `ModelFile`, so that nothing above sees a difference.

Matrices in half precision stay where they are. What MLX quantized, and vectors that are not float32, are derived as
they are read. Knows how MLX names its arrays; what a config means, the architecture says.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import cast

import numpy as np

from edgelm.engine.backend import Packed
from edgelm.engine.foldertext import FolderMetadata
from edgelm.engine.registry import architecture_names, get_architecture
from edgelm.engine.translation import FromFolder, Translation
from edgelm.errors import UnsupportedModel
from edgelm.files.affine import holder
from edgelm.files.errors import BadTensor
from edgelm.files.folder import CONFIG, Config, Folder, fingerprint_of, read_folder
from edgelm.files.ggml_types import Affine, TensorType, row_bytes
from edgelm.files.model import ROW_STEP, Derived, ModelFile, TensorInfo
from edgelm.files.safetensors import Array

_FLOATS = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}
_BLOCK = re.compile(r"model\.layers\.(\d{1,4})\.(.+)")
_WRAPPER = "language_model."  # around the text of a model that also sees
_ALIGNMENT = 64
_NOWHERE = TensorInfo("", TensorType.F32, (1,), 0, 0, 0)  # until the place is known


def open_folder(path: Path) -> ModelFile:
    """Read config and headers of a folder; no weights, and no tokenizer before somebody asks for it.

    Raises `UnsupportedModel` for a `model_type` that no architecture has or a quantization that edgelm does not read,
    and a subclass of `ModelFileError` for what is wrong with a file.
    """
    folder = read_folder(path)
    config = _text_config(folder.config)
    architecture, translation = _translated(config)
    _check_quantization(config)
    tensors = _Tensors(folder, config, translation)
    tensors.add_all()
    keys = {f"{architecture}.{key}": value for key, value in translation.metadata.items()}
    general = {"general.architecture": architecture, "general.name": path.resolve().name}
    sizes = (max(tensors.end, 1), *(file.file_bytes for file in folder.files))
    return ModelFile(
        paths=(path / CONFIG, *(file.path for file in folder.files)),
        metadata=FolderMetadata(path, config, {**general, **keys}),
        tensors=MappingProxyType(tensors.found),
        architecture=architecture,
        header_bytes=sum(file.header_bytes for file in folder.files),
        file_bytes=sizes,
        fingerprint=fingerprint_of(folder),
        derived=MappingProxyType(tensors.derived),
    )


def converted(file: ModelFile, types: frozenset[TensorType]) -> tuple[ModelFile, tuple[str, ...], tuple[str, ...]]:
    """Return the file with affine matrices of a type not in `types` as ggml's.

    With it a sentence on each kind of them, and on what is lost.
    """
    tensors, derived = dict(file.tensors), dict(file.derived)
    forms: list[Affine] = []
    end = number = 0
    for name, how in file.derived.items():
        info = how.place
        number = info.file
        if how.form is not None and info.type not in types:
            forms.append(how.form)
            kind, _ = holder(how.form)
            info = info._replace(type=kind, n_bytes=info.n_rows * row_bytes(kind, info.shape[0]))
            how = how._replace(how="ggml")
        tensors[name] = info = info._replace(offset=end)
        derived[name] = how._replace(place=info)
        end = _aligned(end + info.n_bytes)
    if not forms:
        return file, (), ()
    sizes = list(file.file_bytes)
    sizes[number] = end
    told, lost = [], []
    for form, n in Counter(forms).items():
        kind, error = holder(form)
        told.append(f"{n} matrices are converted: {form.type.name} as {kind.name} ({error or 'exact'})")
        lost += [error] if error else []
    converted_file = file._replace(tensors=tensors, derived=derived, file_bytes=tuple(sizes))
    return converted_file, tuple(told), tuple(dict.fromkeys(lost))


class GgmlLayout:
    """Rows of ggml's types, for matrices that would have to be converted at every read."""

    key = "ggml rows of affine ones, 1"

    def __init__(self, file: ModelFile) -> None:
        self._names = frozenset(name for name, how in file.derived.items() if how.how == "ggml")

    def packed(self, info: TensorInfo) -> Packed | None:
        return Packed(row_bytes(info.type, info.shape[0]), ROW_STEP) if info.name in self._names else None

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        out[:] = rows


def _text_config(config: Config) -> Config:
    """Return the config of the text model: its own, with what is said of the whole beside it."""
    text = config.part("text_config")
    return (
        text.with_defaults({k: v for k, v in config.metadata.items() if k != "text_config"})
        if text.metadata
        else config
    )


def _translated(config: Config) -> tuple[str, Translation]:
    wanted = config.str("model_type")
    known: list[str] = []
    for name in sorted(architecture_names(), key=lambda name: name != wanted):  # most are called alike
        module = get_architecture(name)
        types = getattr(module, "MODEL_TYPES", ())
        if wanted in types:
            return name, cast("FromFolder", module).from_config(config)
        known += types
    raise UnsupportedModel(
        f"{config.path}: model_type {wanted[:40]!r} is not supported (supported: {', '.join(sorted(known))}); "
        "try a model of one of these families"
    )


def _check_quantization(config: Config) -> None:
    """Raise `UnsupportedModel` for a quantization that is not MLX's affine one."""
    if config.has("quantization"):
        mode = config.part("quantization").str("mode", "affine")
        if mode != "affine":
            raise UnsupportedModel(
                f"{config.path}: weights quantized by MLX's mode {mode[:20]!r} are not supported; use affine ones"
            )
    elif config.has("quantization_config"):
        method = config.part("quantization_config").str("quant_method", "unknown")
        raise UnsupportedModel(
            f"{config.path}: weights quantized by {method[:20]!r} are not supported; "
            "use the model in half precision, quantized by MLX, or as GGUF"
        )


@dataclass(slots=True)
class _Tensors:
    """Collects the tensors of a folder under GGUF's names. `end` is where the next derived one begins."""

    folder: Folder
    config: Config
    translation: Translation
    found: dict[str, TensorInfo] = field(default_factory=dict)
    derived: dict[str, Derived] = field(default_factory=dict)
    end: int = 0

    def add_all(self) -> None:
        arrays = self.folder.arrays
        tied = self.config.bool("tie_word_embeddings") if self.config.has("tie_word_embeddings") else None
        for name, (_, array) in arrays.items():
            plain = name.removeprefix(_WRAPPER)
            if plain.startswith(self.translation.ignored) or plain.endswith(".rotary_emb.inv_freq"):
                continue
            module, _, leaf = name.rpartition(".")
            if leaf in ("scales", "biases") and f"{module}.weight" in arrays:
                continue
            if tied is True and plain.startswith("lm_head."):
                continue  # the embedding stands in for it, whatever it holds
            self._add(f"{self._gguf_name(plain.rpartition('.')[0])}.{leaf}", module, array)
        if tied is False and "output.weight" not in self.found:
            raise BadTensor(
                self.folder.path, "config.json says that embedding and output differ, but there is no lm_head"
            )
        for name, numbers in self.translation.vectors.items():
            content = np.asarray(numbers, "<f4").tobytes()
            self._derive(name, TensorType.F32, (len(numbers),), Derived(_NOWHERE, "given", content=content))

    def _gguf_name(self, module: str) -> str:
        names = self.translation.names
        block = _BLOCK.fullmatch(module)
        if block is None:
            return names.get(module, module)
        return f"blk.{int(block[1])}.{names.get(block[2], block[2])}"

    def _add(self, name: str, module: str, array: Array) -> None:
        if f"{module}.scales" in self.folder.arrays and name.endswith(".weight"):
            self._add_affine(name, module)
            return
        kind = _FLOATS.get(array.dtype)
        if kind is None:
            raise UnsupportedModel(
                f"{self.folder.path}: tensor {array.name!r} is of type {array.dtype}, which edgelm computes with only "
                "if MLX packed it (with scales and biases beside it); use half precision, or a model quantized by MLX"
            )
        source = self._info(array, kind)
        plus = self.translation.norm_plus if name.endswith("norm.weight") else 0.0
        if len(source.shape) == 1 and (kind is not TensorType.F32 or plus or source.offset % kind.block_bytes):
            # kernels take vectors as float32 only
            self._derive(name, TensorType.F32, source.shape, Derived(_NOWHERE, "float32", (source,), plus=plus))
        elif source.offset % kind.block_bytes:
            self._derive(name, kind, source.shape, Derived(_NOWHERE, "copy", (source,)))
        else:
            self._put(source._replace(name=name))

    def _add_affine(self, name: str, module: str) -> None:
        arrays = self.folder.arrays
        if f"{module}.biases" not in arrays:
            raise UnsupportedModel(
                f"{self.folder.path}: {module} has scales and no biases; only affine weights are read"
            )
        words, scales, biases = (arrays[f"{module}.{leaf}"][1] for leaf in ("weight", "scales", "biases"))
        form, n = self._form(module, words, scales)
        if biases.shape != scales.shape or biases.dtype != scales.dtype:
            raise BadTensor(self.folder.path, f"scales and biases of {module} differ in shape or type")
        sources = tuple(
            self._info(array, kind)
            for array, kind in ((words, TensorType.I32), (scales, form.scales), (biases, form.scales))
        )
        self._derive(name, form.type, (n, words.shape[0]), Derived(_NOWHERE, "affine", sources, form))

    def _form(self, module: str, words: Array, scales: Array) -> tuple[Affine, int]:
        """Return how a matrix is quantized, and its width, after checking both against the shapes."""
        rule = self.config.part("quantization")
        own = rule.metadata.get(module)
        rule = rule.part(module).with_defaults(rule.metadata) if isinstance(own, dict) else rule
        bits, group = rule.int("bits"), rule.int("group_size", least=1)
        dtype = _FLOATS.get(scales.dtype)
        if words.dtype != "U32" or dtype is None or len(words.shape) != 2 or len(scales.shape) != 2:
            raise BadTensor(self.folder.path, f"{module} does not have packed words and scales in two dimensions")
        form = Affine(bits, group, dtype)
        if not form.is_known:
            raise UnsupportedModel(f"{self.folder.path}: {module} has {bits} bits in groups of {group}, unknown here")
        n = scales.shape[1] * group
        if n * bits != words.shape[1] * 32 or words.shape[0] != scales.shape[0]:
            raise BadTensor(
                self.folder.path,
                f"{module}: words {words.shape} and scales {scales.shape} do not fit {bits} bits in groups of {group}",
            )
        return form, n

    def _info(self, array: Array, kind: TensorType) -> TensorInfo:
        file = self.folder.arrays[array.name][0] + 1  # file 0 is the derived one
        shape = array.shape[::-1] or (1,)
        return TensorInfo(array.name, kind, shape, file, array.offset, array.n_bytes)

    def _derive(self, name: str, kind: TensorType, shape: tuple[int, ...], how: Derived) -> None:
        n_bytes = row_bytes(kind, shape[0]) * math.prod(shape[1:])
        place = TensorInfo(name, kind, shape, 0, self.end, n_bytes)
        self.derived[name] = how._replace(place=place)
        self._put(place)
        self.end = _aligned(self.end + n_bytes)

    def _put(self, info: TensorInfo) -> None:
        if info.name in self.found:
            raise BadTensor(self.folder.path, f"two tensors of the folder are {info.name!r}")
        self.found[info.name] = info


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
