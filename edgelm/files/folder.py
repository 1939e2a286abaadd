"""Read what a model folder of the Hugging Face kind says: config.json, the arrays of all its files, and small texts.

Checks that files are there, are JSON, and hold what the index promises. Knows no architecture and no tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgelm.errors import ModelFileError, UnsupportedModel
from edgelm.files.errors import BadHeader, DuplicatePart, MismatchedPart, MissingPart, NotAModelFile
from edgelm.files.meta import Meta
from edgelm.files.safetensors import Array, Arrays, read_arrays
from edgelm.hashing import blake2b
from edgelm.sizes import human

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
TEMPLATE = "chat_template.jinja"
TEXT_FILES = (TOKENIZER, TOKENIZER_CONFIG, GENERATION, TEMPLATE)
"""What decides the tokens, besides config.json."""
MAX_JSON_BYTES = 64 * 2**20
MAX_PARTS = 4096
_CHUNK = 1 << 16


class Config(Meta):
    """Typed access to a JSON object of a folder: `config.json`, or an object in it. What is null is not there."""

    def __init__(self, path: Path | str, content: Mapping[str, Any]) -> None:
        super().__init__(path, "", {key: value for key, value in content.items() if value is not None})

    def part(self, key: str) -> Config:
        """Return the object under `key`; an empty one if there is none."""
        value = self.metadata.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Config(self.path, value)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """Return the same object with values for what it leaves out."""
        return Config(self.path, {**defaults, **self.metadata})

    def strings(self, key: str) -> tuple[str, ...]:
        """Return a list of strings; none if there is no such key."""
        value = self.metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of strings")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a list of finite numbers."""
        value = self._get(key, None)
        if not isinstance(value, list) or not all(
            type(number) in (int, float) and math.isfinite(number) for number in value
        ):
            raise self._wrong(key, value, "a list of numbers")
        return tuple(map(float, value))

    def _full(self, key: str) -> str:
        return key

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise UnsupportedModel(f"{self.path}: it does not say {key}, which models of this kind need")
        return value


class Folder(NamedTuple):
    """A model folder: its config, and the arrays of its weight files by name, each with the number of its file."""

    path: Path
    config: Config
    files: tuple[Arrays, ...]
    arrays: Mapping[str, tuple[int, Array]]


def read_folder(path: Path) -> Folder:
    """Read config and headers; no weights. Raises a subclass of `ModelFileError`, or `UnsupportedModel`."""
    if not (path / CONFIG).is_file():
        raise NotAModelFile(path, f"the folder holds weights and no {CONFIG}", "download the whole folder")
    config = Config(path / CONFIG, read_object(path / CONFIG))
    placed = _weight_map(path)
    files = tuple(read_arrays(path / name) for name in sorted(set(placed.values())) or [WEIGHTS])
    arrays: dict[str, tuple[int, Array]] = {}
    for number, file in enumerate(files):
        for array in file.arrays:
            if array.name in arrays:
                first = files[arrays[array.name][0]].path.name
                raise DuplicatePart(file.path, f"the tensor {array.name!r} is also in {first}")
            arrays[array.name] = number, array
    for name, file_name in placed.items():
        if name not in arrays or files[arrays[name][0]].path.name != file_name:
            raise MismatchedPart(path / INDEX, f"the tensor {name[:80]!r} is not in {file_name}, as it says")
    return Folder(path, config, files, arrays)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises `ModelFileError` or `BadHeader`."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(path, f"the file cannot be read: {reason}", "download the whole folder") from None
    if len(text) > MAX_JSON_BYTES:
        raise BadHeader(path, f"the file is larger than {human(MAX_JSON_BYTES)}")
    try:
        found = json.loads(text)
    except RecursionError:
        raise BadHeader(path, "the file is nested too deeply") from None
    except ValueError as error:
        raise BadHeader(path, f"the file is not sound JSON ({str(error)[:120]})") from None
    if not isinstance(found, dict):
        raise BadHeader(path, "the file does not hold a JSON object")
    return found


def read_optional(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, an empty one if there is no such file."""
    return read_object(path) if path.exists() else {}


def chunks_of(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, none if it cannot be read."""
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError:
        return


def read_text(path: Path) -> str | None:
    """Return the text of a small file, None if there is none. Raises `ModelFileError`."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            return file.read(MAX_JSON_BYTES).decode()
    except (OSError, ValueError) as error:
        raise ModelFileError(path, f"the file cannot be read as text: {error}") from None


def _weight_map(path: Path) -> dict[str, str]:
    """Return the name of the file of each tensor; nothing if there is one file only."""
    if (path / WEIGHTS).exists():
        return {}
    if not (path / INDEX).exists():
        gguf = sorted(found.name for found in path.iterdir() if found.suffix == ".gguf")
        hint = f"give the path of {gguf[0]} in it" if gguf else "download those files (another format does not do)"
        raise MissingPart(path, f"the folder holds neither {WEIGHTS} nor {INDEX}", hint)
    placed = read_object(path / INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise BadHeader(path / INDEX, "weight_map is not an object that names the file of each tensor")
    names = sorted(set(placed.values()))
    for name in names:
        if name != Path(name).name or not name.endswith(".safetensors") or "\\" in name or ":" in name:
            raise BadHeader(path / INDEX, f"{name[:80]!r} is not the name of a safetensors file of this folder")
    if len(names) > MAX_PARTS:
        raise BadHeader(path / INDEX, f"it names {len(names)} files, more than {MAX_PARTS}")
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise MissingPart(path, f"{len(missing)} of {len(names)} weight files are missing: {shown}", "download them")
    return placed


def fingerprint_of(folder: Folder) -> str:
    """Return a key of config and tokenizer, and of the headers and sizes of the weight files."""
    digest = blake2b(digest_size=16)
    for name in (CONFIG, *TEXT_FILES):
        digest.update(name.encode() + b"\0")
        for chunk in chunks_of(folder.path / name):
            digest.update(chunk)
    for file in folder.files:
        digest.update(file.digest + file.file_bytes.to_bytes(8, "little"))
    return digest.hexdigest()
