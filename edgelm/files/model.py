"""What the header of a model says, as values: where each tensor lies, and the metadata.

Knows no file format, so that a model known from before is opened without the code that parses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from edgelm.files.ggml_types import Affine, TensorType, row_bytes

if TYPE_CHECKING:
    from edgelm.files.pack import Pack

ROW_STEP = 32
"""Matrices are cut at multiples of this many rows: kernels work on panels of rows and must not see other edges."""


class TensorInfo(NamedTuple):
    """Where a tensor lies. `shape` is in ggml's order, the fastest dimension (a row's length) first."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    file: int
    """Index into `ModelFile.paths`."""
    offset: int
    """Absolute, in bytes, in that file."""
    n_bytes: int
    row_step: int = ROW_STEP
    """Rows between two places where the tensor may be cut: of a pack, those that one checksum covers."""
    packed_row_bytes: int = 0
    """Bytes of a row in the layout of a backend, whatever `type` says of the numbers; 0: as ggml lays them out."""

    @property
    def n_rows(self) -> int:
        """Rows of `shape[0]` weights each."""
        return self.n_bytes // self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.packed_row_bytes or row_bytes(self.type, self.shape[0])


class Checksums(NamedTuple):
    """XXH3-64 of every tile (`row_step` rows) of these tensors of one file, in their order.

    `hint` says what to do where one is wrong, if that is not to copy or pack the model again.
    """

    file: int
    tensors: tuple[TensorInfo, ...]
    sums: memoryview
    hint: str = ""


class Derived(NamedTuple):
    """How the bytes of a tensor are made that stand like this in none of the files.

    `how` says of what: "affine": of words, scales and biases, whose rows become the rows of an affine type; "ggml":
    of these three, too, whose numbers become the tensor's type; "float32": of one tensor, its numbers plus `plus`;
    "copy": of one tensor, its bytes (those of a tensor that lies at an odd place); "given": they are `content`.
    """

    place: TensorInfo
    """Where the bytes would be: offsets count in a file that holds none of them."""
    how: Literal["affine", "ggml", "float32", "copy", "given"]
    sources: tuple[TensorInfo, ...] = ()
    """Places in the files of the model; words are I32, two dimensions each."""
    form: Affine | None = None
    """What words, scales and biases mean."""
    plus: float = 0.0
    content: bytes = b""


class ModelFile(NamedTuple):
    """A model's header. Holds no open file, so the files may be opened by whoever reads the weights.

    `metadata` has Python scalars, NumPy arrays of numbers, and `StringArray`s. `tensors` is in file order.
    `header_bytes` counts the headers of all parts. `fingerprint` is a hex key of the headers and the sizes of the
    files: equal for a copy elsewhere; two files that differ in weights alone have the same one.
    """

    paths: tuple[Path, ...]
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    architecture: str
    header_bytes: int
    file_bytes: tuple[int, ...]
    fingerprint: str
    pack: Pack | None = None
    """What edgelm has appended, if the file was opened as a pack: `edgelm.files.index.open_indexed`."""
    gathered: Mapping[str, TensorInfo] = MappingProxyType({})
    """Where the rows of an embedding are, if the matrix of the same name lies in the layout of a backend."""
    checksums: tuple[Checksums, ...] = ()
    """Of the files that have some: `edgelm.memory.verified`."""
    derived: Mapping[str, Derived] = MappingProxyType({})
    """What `edgelm.memory.derived.DerivedStore` makes as it is read, by the names of the tensors. The `file` of their
    places stands in `file_bytes` as if it held them: a folder's config.json. All else lies where it says."""

    @property
    def name(self) -> str:
        """The name of the file, of a folder the folder's."""
        first = self.paths[0]
        return first.parent.name if first.name == "config.json" else first.name

    @property
    def total_tensor_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(info.n_bytes for info in self.tensors.values())

    @property
    def main_part(self) -> int:
        """The index into `paths` of the file with the most weights."""
        sizes = [0] * len(self.paths)
        for info in self.tensors.values():
            sizes[info.file] += info.n_bytes
        return max(range(len(sizes)), key=sizes.__getitem__)
