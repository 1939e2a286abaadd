"""Read through another store and compare what came with the checksums of a pack or of a prepared file.

Knows where tensors lie and how many of their rows one checksum covers. What is wrong is read once more past every
cache; wrong twice is an error that names the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from edgelm.files.errors import DamagedWeights
from edgelm.files.model import Checksums, ModelFile, TensorInfo
from edgelm.files.pack import hasher, n_tiles
from edgelm.memory.stores import Store


class _Tiled(NamedTuple):
    """A tensor, the bytes of its tiles (the last one may be shorter), and the number of its first checksum."""

    info: TensorInfo
    tile_bytes: int
    first_sum: int

    @property
    def end(self) -> int:
        return self.info.offset + self.info.n_bytes


class VerifiedStore:
    """`store` over files with checksums, every tile checked that lies in a range as a whole.

    `again` serves what was wrong once: the store that reads past caches, if `store` does not. Ranges that end inside
    a tile leave that tile unchecked: `units.requests` cuts at whole ones.
    """

    def __init__(self, store: Store, file: ModelFile, again: Store | None = None) -> None:
        assert file.checksums, "nothing to compare with"
        self.below, self._again = store, again or store
        self._digest = hasher(file.paths[0])
        self._checked = {part.file: _Checked(file.paths[part.file], part) for part in file.checksums}

    @property
    def how(self) -> str:
        return f"{self.below.how}, checksums verified"

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        first = self.below.read_into(file, offset, n_bytes, buffer, at)
        checked = self._checked.get(file)
        if checked is None or checked.wrong(offset, buffer[first : first + n_bytes], self._digest) is None:
            return first
        first = self._again.read_into(file, offset, n_bytes, buffer, at)
        if (wrong := checked.wrong(offset, buffer[first : first + n_bytes], self._digest)) is not None:
            raise checked.damaged(*wrong)
        return first

    def close(self) -> None:
        self.below.close()


class _Checked:
    """The checksums of one file."""

    def __init__(self, path: Path, part: Checksums) -> None:
        self._path, self._hint, self._sums = path, part.hint, part.sums.cast("Q")
        self._tensors: list[_Tiled] = []
        n_sums = 0
        for info in part.tensors:
            self._tensors.append(_Tiled(info, info.row_step * info.row_bytes, n_sums))
            n_sums += n_tiles(info)
        self._tensors.sort(key=lambda tensor: tensor.info.offset)
        self._starts = [tensor.info.offset for tensor in self._tensors]

    def wrong(self, offset: int, content: memoryview, digest: Callable[[Any], int]) -> tuple[_Tiled, int] | None:
        """Return the first tile that is wrong, if any: its tensor and its number there."""
        for tensor in self._touched(offset, offset + len(content)):
            begin, tile = tensor.info.offset, tensor.tile_bytes
            number = max(0, -(-(offset - begin) // tile))
            start, stop = begin + number * tile, min(tensor.end, offset + len(content))
            while start < stop:
                end = min(start + tile, tensor.end)
                if end > stop:
                    break
                if digest(content[start - offset : end - offset]) != self._sums[tensor.first_sum + number]:
                    return tensor, number
                start, number = end, number + 1
        return None

    def _touched(self, start: int, stop: int) -> Iterator[_Tiled]:
        place = max(bisect_right(self._starts, start) - 1, 0)
        while place < len(self._tensors) and self._starts[place] < stop:
            yield self._tensors[place]
            place += 1

    def damaged(self, tensor: _Tiled, number: int) -> DamagedWeights:
        info = tensor.info
        first = number * info.row_step
        last = min(first + info.row_step, info.n_rows) - 1
        fact = (
            f"rows {first} to {last} of tensor {info.name!r} (at byte {info.offset + number * tensor.tile_bytes}) "
            "do not match their checksum, also when read again"
        )
        return DamagedWeights(self._path, fact, self._hint) if self._hint else DamagedWeights(self._path, fact)


def verified(store: Store, file: ModelFile, again: Store | None = None) -> Store:
    """Return `store` with verification if there are checksums, else `store` itself."""
    return VerifiedStore(store, file, again) if file.checksums else store


def unverified(store: Store) -> Store:
    """Return what `store` reads through: for measuring, where several reads share memory and nobody needs the bytes."""
    return store.below if isinstance(store, VerifiedStore) else store
