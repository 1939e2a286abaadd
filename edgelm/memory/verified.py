"""Read through another store and compare what came with the checksums of a pack.

Knows where tensors lie and how many of their rows one checksum covers. What is wrong is read once more past every
cache; wrong twice is an error that names the rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from edgelm.files.errors import DamagedWeights
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.files.pack import hasher, n_tiles
from edgelm.memory.stores import Store


@dataclass(frozen=True, slots=True)
class _Tiled:
    """A tensor, the bytes of its tiles (the last one may be shorter), and the number of its first checksum."""

    info: TensorInfo
    tile_bytes: int
    first_sum: int

    @property
    def end(self) -> int:
        return self.info.offset + self.info.n_bytes


class VerifiedStore:
    """`store` over the file of a pack, every tile checked that lies in a range as a whole.

    `again` serves what was wrong once: the store that reads past caches, if `store` does not. Ranges that end inside
    a tile leave that tile unchecked: `units.requests` cuts at whole ones.
    """

    def __init__(self, store: Store, file: ModelFile, again: Store | None = None) -> None:
        assert file.pack is not None, "only packs have checksums"
        self._store, self._again = store, again or store
        self._path, self._digest = file.paths[0], hasher(file.paths[0])
        self._sums = file.pack.checksums.cast("Q")
        self._tensors: list[_Tiled] = []
        n_sums = 0
        for info in file.tensors.values():
            self._tensors.append(_Tiled(info, info.row_step * info.row_bytes, n_sums))
            n_sums += n_tiles(info)
        self._tensors.sort(key=lambda tensor: tensor.info.offset)
        self._starts = [tensor.info.offset for tensor in self._tensors]

    @property
    def how(self) -> str:
        return f"{self._store.how}, checksums verified"

    def read_into(self, file: int, offset: int, n_bytes: int, buffer: memoryview, at: int) -> int:
        first = self._store.read_into(file, offset, n_bytes, buffer, at)
        if file != 0 or self._wrong(offset, buffer[first : first + n_bytes]) is None:
            return first  # a pack is one file
        first = self._again.read_into(file, offset, n_bytes, buffer, at)
        if (wrong := self._wrong(offset, buffer[first : first + n_bytes])) is not None:
            raise self._damaged(*wrong)
        return first

    def close(self) -> None:
        self._store.close()

    def _wrong(self, offset: int, content: memoryview) -> tuple[_Tiled, int] | None:
        """Return the first tile that is wrong, if any: its tensor and its number there."""
        for tensor in self._touched(offset, offset + len(content)):
            begin, tile = tensor.info.offset, tensor.tile_bytes
            number = max(0, -(-(offset - begin) // tile))
            start, stop = begin + number * tile, min(tensor.end, offset + len(content))
            while start < stop:
                end = min(start + tile, tensor.end)
                if end > stop:
                    break
                if self._digest(content[start - offset : end - offset]) != self._sums[tensor.first_sum + number]:
                    return tensor, number
                start, number = end, number + 1
        return None

    def _touched(self, start: int, stop: int) -> Iterator[_Tiled]:
        place = max(bisect_right(self._starts, start) - 1, 0)
        while place < len(self._tensors) and self._starts[place] < stop:
            yield self._tensors[place]
            place += 1

    def _damaged(self, tensor: _Tiled, number: int) -> DamagedWeights:
        info = tensor.info
        first = number * info.row_step
        last = min(first + info.row_step, info.n_rows) - 1
        where = info.offset + number * tensor.tile_bytes
        return DamagedWeights(
            self._path,
            f"rows {first} to {last} of tensor {info.name!r} (at byte {where}) do not match their checksum, "
            "also when read again",
        )


def verified(store: Store, file: ModelFile, again: Store | None = None) -> Store:
    """Return `store` with verification if the file is a pack, else `store` itself."""
    return store if file.pack is None else VerifiedStore(store, file, again)
