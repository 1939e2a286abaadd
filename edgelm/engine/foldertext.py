"""The metadata of a model folder: config at once, the vocabulary of tokenizer.json when somebody asks for it.

Most starts find the tokenizer's tables in the cache and never read tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgelm.engine.children import can_start, run_child
from edgelm.errors import UnsupportedModel
from edgelm.files.errors import BadHeader
from edgelm.files.folder import (
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Config,
    read_object,
    read_optional,
    read_text,
)
from edgelm.files.strings import StringArray
from edgelm.text.cache import path_of

_LAZY = ("tokenizer.ggml.", "tokenizer.edgelm.")
_SMALL_BYTES = 1 << 20
_TIMEOUT_S = 300.0
_CHILD = """
import sys
from edgelm.engine.loading import open_path
from edgelm.text.tokenizer import load_tokenizer
load_tokenizer(open_path(sys.argv[1]))
"""


def build_tables_apart(path: Path, fingerprint: str) -> None:
    """Build the tokenizer's tables of a folder in a child process, if they are not in the cache yet.

    As Python objects, a tokenizer.json of 16 MB takes 240 MB for a moment: more than many a budget. Where the child
    fails nothing is lost: whoever loads the tokenizer then builds it, or says what is wrong.
    """
    with suppress(OSError):  # no such file: whoever needs it says so
        if can_start() and not path_of(fingerprint).exists() and (path / TOKENIZER).stat().st_size >= _SMALL_BYTES:
            run_child(_CHILD, (str(path),), _TIMEOUT_S, "reading the tokenizer")


class FolderMetadata(Mapping[str, Any]):
    """`kept`, the chat template, and what tokenizer.json says."""

    def __init__(self, path: Path, config: Config, kept: Mapping[str, Any]) -> None:
        self._path, self._config = path, config
        self._tokenizer_config = read_optional(path / TOKENIZER_CONFIG)
        self._kept = dict(kept)
        if (template := self._template()) is not None:
            self._kept["tokenizer.chat_template"] = template
        self._read: Mapping[str, Any] | None = None

    def _template(self) -> str | None:
        alone = read_text(self._path / TEMPLATE)
        found = alone if alone is not None else self._tokenizer_config.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
            found = named[0].get("template") if named else None
        if found is not None and not isinstance(found, str):
            raise BadHeader(self._path / TOKENIZER_CONFIG, "chat_template is neither a text nor a list of named texts")
        return found

    def _lazy(self) -> Mapping[str, Any]:
        if self._read is None:
            from edgelm.text.hugging_face import gguf_metadata

            path = self._path / TOKENIZER
            if not path.exists():
                raise UnsupportedModel(
                    f"{self._path}: the folder holds no {TOKENIZER}; download the whole folder, "
                    "or save the tokenizer in that form"
                )
            n_vocab = self._config.int("vocab_size", 0)
            keys = gguf_metadata(path, read_object(path), self._tokenizer_config, self._ends(), n_vocab)
            try:
                self._read = {key: StringArray.of(v) if isinstance(v, list) else v for key, v in keys.items()}
            except UnicodeEncodeError:
                raise BadHeader(path, "a token is half a surrogate pair, which is no text") from None
        return self._read

    def _ends(self) -> list[int]:
        """Return every id that generation_config.json or config.json says ends an answer."""
        ends: list[Any] = []
        for config in (read_optional(self._path / GENERATION), self._config.metadata):
            found = config.get("eos_token_id")
            ends += found if isinstance(found, list) else [found]
        return [end for end in ends if type(end) is int]

    def __getitem__(self, key: str) -> Any:
        if key in self._kept or not key.startswith(_LAZY):
            return self._kept[key]
        return self._lazy()[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from (key for key in self._lazy() if key not in self._kept)

    def __len__(self) -> int:
        return len(list(iter(self)))
