"""What a backend is: it probes itself, opens a session, and lowers segments into programs.

Importing a backend's module must not import its heavy library: `probe` and `open` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from edgelm.engine.ir import Segment
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo


class Availability(NamedTuple):
    """Whether a backend can be used here; `reason` says why not, `version` what was found."""

    available: bool
    reason: str = ""
    version: str = ""


class CacheLayout(NamedTuple):
    """How a backend wants keys and values to lie. Keys are always [head, place, dimension].

    `item`: "f16" or "f32". `values`: "dim_place" is [head, dimension, place], "place_dim" as the keys. Without `rings`
    layers with a window have a place for every position, too.
    """

    item: str = "f16"
    values: str = "dim_place"
    rings: bool = True


class Capabilities(NamedTuple):
    """What a backend can do: the tensor types of its matrices, and whether weights may move between passes."""

    types: frozenset[TensorType]
    streams: bool = True
    cache: CacheLayout = CacheLayout()


class Packed(NamedTuple):
    """How a matrix lies in a backend's own layout: tiles of `row_step` rows, `row_bytes` for each row of a tile.

    `error` says what the conversion loses, in a sentence; it is empty for an exact one.
    """

    row_bytes: int
    row_step: int
    error: str = ""


class WeightLayout(Protocol):
    """A layout of weights on flash that a backend computes on without further work.

    `key` changes whenever the bytes would: with the library, the processor, the layout itself.
    """

    key: str

    def packed(self, info: TensorInfo) -> Packed | None:
        """Return how this matrix is packed, or None if it stays as it is in the file."""

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        """Convert one tile: `rows` are its rows as in the file, `out` has `Packed.row_bytes` for each of them."""


class CacheGroup(NamedTuple):
    """The cache of layers that share a window: `capacity` places allocated, the first `length` of them in use.

    Keys of a layer are float16 [head, place, dimension], values float16 [head, dimension, place], C order: with the
    places innermost, the weighted sum over values is a matrix product without a copy.
    """

    capacity: int
    length: int


class PassShape(NamedTuple):
    """What a program is compiled for: rows of the pass, rows whose logits are wanted, and the caches' extents."""

    n_tokens: int
    n_outputs: int
    groups: tuple[CacheGroup, ...]

    def rows(self, per: str) -> int:
        return self.n_tokens if per == "token" else self.n_outputs


@dataclass(slots=True)
class Bindings:
    """Addresses of everything a program reads and writes; valid during `run`.

    `inputs`, `outputs`: float32 [rows, width], one address for each of the segment's. `weights`: one for each of the
    segment's, rows as in the file (an `embed` weight: the gathered rows, `n_tokens` of them). `keys`, `values`: one
    for each layer of the segment. `positions`: int32 [n_tokens]. `out_rows`: int32 [n_outputs]. For each cache group
    `places`: int64 [n_tokens], where the row's key and value go, and `masks`: float32 [n_tokens, length], 0 or -inf.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[int, ...]
    keys: tuple[int, ...]
    values: tuple[int, ...]
    positions: int
    out_rows: int
    places: tuple[int, ...]
    masks: tuple[int, ...]


class Program(Protocol):
    """A compiled segment. Not thread-safe; programs of one session share scratch memory."""

    def run(self, bindings: Bindings) -> None:
        """Compute the segment. Raises `Cancelled` if `Session.abort` was called meanwhile."""


@runtime_checkable
class Session(Protocol):
    """An open backend: its library is loaded, its threads exist."""

    def compile(self, segment: Segment, shape: PassShape) -> Program: ...

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        """Bytes of temporary memory that this segment needs at this shape, beyond what is bound. Allocates nothing."""

    def reserve(self, scratch_bytes: int) -> None:
        """Promise that no program will need more scratch memory than this. Programs from before are not run again."""

    def use_threads(self, n_threads: int) -> None:
        """Compute later passes with this many threads, at most those that the session was opened with."""

    def abort(self, on: bool) -> None:
        """Make running and later programs raise `Cancelled` while on. Called from any thread."""

    def close(self) -> None: ...


class Backend(Protocol):
    """A way to compute. One small package each, registered under the entry point `edgelm.backends`."""

    name: str

    def probe(self) -> Availability:
        """Say whether the backend works here. May load its library; may crash: callers probe in a child process."""

    def capabilities(self) -> Capabilities: ...

    def open(self, n_threads: int) -> Session:
        """Load the library. Raises `BackendUnavailable`."""
