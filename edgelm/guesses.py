"""What Token Recycling learned of a model, in a file of its own: 36 bytes for each token that was met.

It shows which tokens earlier texts had, so only its owner can read it. A file that is damaged costs speed, not tokens:
guesses are verified.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.speculation.recycling import MOST_TOKENS, SUCCESSORS
from edgelm.files import kept
from edgelm.files.errors import DamagedCache
from edgelm.files.writing import whole_or_nothing

if TYPE_CHECKING:
    from edgelm.engine.speculation.speculator import Speculator
    from edgelm.files.model import ModelFile

MAGIC = b"edgelmG1"
_COLUMNS = 1 + SUCCESSORS


class Learned:
    """What a speculator knows, read from flash and written back."""

    def __init__(self, speculator: Speculator | None, file: ModelFile, identity: str) -> None:
        self._speculator, self._path = speculator, kept.guesses_path(file.fingerprint, identity)

    def recall(self, n_vocab: int) -> tuple[str, ...]:
        """Let the speculator know what an earlier process has kept; return sentences on what is wrong, mostly none."""
        if self._speculator is None:
            return ("nothing is guessed, so no guesses are kept",)
        try:
            kept.make_folder()
            if self._path.is_file():
                self._speculator.table = _read(self._path, n_vocab)
        except OSError as error:
            return (f"what is learned for guesses cannot be kept in {kept.folder()}: {error.strerror}",)
        except DamagedCache as error:
            return (f"what was learned for guesses is of no use: {error}",)
        return ()

    def keep(self) -> None:
        """Keep what the speculator knows, if it knows anything. On a full drive the next process learns anew."""
        if self._speculator is not None and len(table := self._speculator.table):
            with suppress(OSError), whole_or_nothing(self._path, private=True) as out:
                out.write(MAGIC + table.astype("<u4").tobytes())


def _read(path: Path, n_vocab: int) -> NDArray[np.uint32]:
    with path.open("rb") as file:
        data = file.read(len(MAGIC) + MOST_TOKENS * _COLUMNS * 4 + 1)
    table = data.removeprefix(MAGIC)
    n_rows, rest = divmod(len(table), _COLUMNS * 4)
    if len(table) == len(data) or rest or n_rows > MOST_TOKENS:
        raise DamagedCache(path, "it is no table of guesses")
    found = np.frombuffer(table, "<u4").reshape(-1, _COLUMNS)
    if found.size and int(found.max()) >= n_vocab:
        raise DamagedCache(path, "it holds tokens that the model does not know")
    return found
