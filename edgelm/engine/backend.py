"""What a backend is: it probes itself, opens a session, and lowers segments into programs.

Importing a backend's module must not import its heavy library: `probe` and `open` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, runtime_checkable

from edgelm.engine.ir import Segment, Weight
from edgelm.files.ggml_types import TensorType
from edgelm.files.graph import GraphModel
from edgelm.files.model import TensorInfo
from edgelm.memory.cache_layout import CacheLayout as CacheLayout
from edgelm.memory.cache_layout import is_quantized as is_quantized
from edgelm.memory.cache_layout import vector_bytes as vector_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray


class Availability(NamedTuple):
    """Whether a backend can be used here; `reason` says why not, `version` what was found.

    `graphs`: one that is not available computes models all the same that are one graph (`GraphBackend`).
    """

    available: bool
    reason: str = ""
    version: str = ""
    graphs: bool = False


class Capabilities(NamedTuple):
    """What a backend can do: the tensor types of its matrices, and whether weights may move between passes.

    A `simulated` one computes for a device that is not there; it is never chosen unless it is asked for by name.
    `activations` says what products with quantized matrices round the other side to, which decides how close to the
    oracle the backend must come: "f32" (not at all, or to no less than 16 bits) or "int8".
    """

    types: frozenset[TensorType]
    streams: bool = True
    cache: CacheLayout = CacheLayout()
    simulated: bool = False
    kv: frozenset[str] = frozenset({"f16"})
    """Types that keys and values may have in the cache; see `CacheLayout`."""
    activations: Literal["f32", "int8"] = "f32"


class Packed(NamedTuple):
    """How a matrix lies in a backend's own layout: tiles of `row_step` rows, `row_bytes` for each row of a tile.

    `error` says what the conversion loses, in a sentence; it is empty for an exact one.
    """

    row_bytes: int
    row_step: int
    error: str = ""


class WeightLayout(Protocol):
    """A layout of matrices that a backend computes on without further work; they are converted once and kept on flash.

    The matrices of a segment (the first weight of every `linear`) then come in this layout if `packed` says so for
    their type and shape; a cut has whole tiles but for the last. Vectors and gathered rows stay as in the file.
    """

    @property
    def key(self) -> str:
        """Changes whenever the bytes would: with the library, the processor, the layout itself."""

    def packed(self, info: TensorInfo) -> Packed | None:
        """Return how this matrix is packed, or None if it stays as it is in the file.

        Depends on type and shape alone: a program knows no more of a matrix. Cheap: asked for every matrix at a start.
        """

    def pack(self, info: TensorInfo, first_row: int, rows: memoryview, out: memoryview) -> None:
        """Convert one tile: `rows` are its rows as in the file, `out` has `Packed.row_bytes` for each of them.

        `out` is zero before. Depends on nothing but its arguments, and keeps neither view.
        """


class CacheGroup(NamedTuple):
    """The cache of layers that share a window: `capacity` places allocated, the first `length` of them in use.

    Keys of a layer are [head, place, dimension], values [head, dimension, place], float16 in C order, unless the
    backend's `CacheLayout` says otherwise.
    """

    capacity: int
    length: int


class PassShape(NamedTuple):
    """What a program is compiled for: rows of the pass, rows whose logits are wanted, and the caches' extents.

    Of a `tree` rows do not follow each other: what a row sees is what its mask says, and nothing else tells.
    """

    n_tokens: int
    n_outputs: int
    groups: tuple[CacheGroup, ...]
    tree: bool = False
    cache: CacheLayout = CacheLayout()
    verified: bool = False
    """Rows are compared with what passes of one token give: a backend that can gives them the same bits."""

    def rows(self, per: str) -> int:
        return self.n_tokens if per == "token" else self.n_outputs


class Bindings(NamedTuple):
    """Addresses of everything a program reads and writes; valid during `run`.

    `inputs`, `outputs`: float32 [rows, width], one address for each of the segment's. `weights`: one for each of the
    segment's, rows as in the file or in the backend's layout (an `embed` weight: the gathered rows, `n_tokens` of
    them), or what `Adopting.adopt` returned. `keys`, `values`: one for each layer of the segment. `positions`: int32
    [n_tokens]. `out_rows`: int32 [n_outputs]. For each cache group
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
    """An open backend: its library is loaded, its threads exist.

    One with an attribute `version: str` says what it has loaded: it must be what `Backend.probe` said.
    """

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


@runtime_checkable
class Resting(Protocol):
    """A session whose threads spin between programs, where others may want to compute."""

    def rest(self) -> None:
        """Let them sleep until the next program."""


@runtime_checkable
class Adopting(Protocol):
    """A session that cannot compute on memory of others: it takes copies of the weights that stay.

    The core loads them one at a time, lets them be adopted, and gives its own memory back; the plan counts the copy as
    it would count the weight itself. Weights that are streamed come as addresses in every run, and what a session
    needs to hold them is part of its `scratch_bytes`.
    """

    def adopt(self, weight: Weight, address: int, matrix: bool) -> int:
        """Copy the weight at `address` and return a negative number that stands for it in `Bindings.weights`.

        `matrix`: the first weight of a `linear`, in the backend's layout if it has one for it; else one row of numbers
        as in the file. The bytes at `address` are gone afterwards.
        """

    def drop(self, handle: int) -> None:
        """Give the memory of an adopted weight back at once. Programs that were bound to it are not run again."""


class Backend(Protocol):
    """A way to compute. One small package each, registered under the entry point `edgelm.backends`.

    A method `identity() -> str` may say what changes whenever its library does, loading nothing; else it is the file
    of the backend's module.
    """

    name: str

    def probe(self) -> Availability:
        """Say whether the backend works here. May load its library; may crash: callers probe in a child process."""

    def capabilities(self) -> Capabilities: ...

    def open(self, n_threads: int) -> Session:
        """Load the library. Raises `BackendUnavailable`."""


@runtime_checkable
class HasLayout(Protocol):
    """A backend that holds matrices in a layout of its own; others compute on the bytes of the file."""

    def layout(self) -> WeightLayout | None:
        """Return the layout, or None where this machine has none. Called while a session is open."""


def layout_of(backend: Backend) -> WeightLayout | None:
    """Return the layout that a backend wants its matrices in; None: as in the file."""
    return backend.layout() if isinstance(backend, HasLayout) else None


@runtime_checkable
class Rounding(Protocol):
    """A backend whose library also rounds weights to types of few bits."""

    def rounding(self, kind: TensorType) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]] | None:
        """Return what turns rows of numbers [n, width] into their bytes [n, bytes of a row]; None: not of this type.

        The width is a whole number of blocks. Loads the library; raises `BackendUnavailable`.
        """


class GraphBuffers(NamedTuple):
    """Addresses of all that a whole model reads and writes, for as long as it is open.

    `ids`: [1, n_tokens], `mask`: [1, context] ones, `positions`: [1, context] counting from 0; `logits`: [1, n_tokens,
    n_vocab], or [1, 1, n_vocab] of a model that `sees_last`. `keys`, `values`: of each layer [1, heads, context,
    dimension]. Caches that do not grow in place lie densely, [1, heads, n_past, dimension], and come out in the other
    of two sets. All are of the types of the graph's ports.
    """

    ids: int
    mask: int
    positions: int
    logits: int
    caches: tuple[tuple[tuple[int, int], ...], ...]
    """One set of (key, value) for each layer, or two."""
    context: int


class GraphMemory(NamedTuple):
    """What a whole model takes in the hands of its library; `peak_bytes` is reached while it is loaded."""

    weights_bytes: int
    runtime_bytes: int
    peak_bytes: int


class GraphSession(Protocol):
    """A model that is one graph, in the hands of a library: resident only, the weights are the library's own."""

    def memory(self) -> GraphMemory:
        """Say, before loading, what the model will take at the most beyond what `GraphBuffers` hold."""

    def scratch_bytes(self, n_tokens: int, context: int) -> int:
        """Return the temporary memory of the largest pass of so many tokens."""

    def load(self) -> None:
        """Read the weights. Raises `ModelFileError` or `UnsupportedModel`."""

    def bind(self, buffers: GraphBuffers) -> None: ...

    def run(self, n_tokens: int, n_past: int, side: int) -> None:
        """Compute a pass over `n_tokens` ids, reading the caches of set `side`. Raises `Cancelled` after `abort`."""

    def abort(self, on: bool) -> None:
        """Make running and later passes raise `Cancelled` while on. Called from any thread."""

    def close(self) -> None: ...


@runtime_checkable
class GraphBackend(Protocol):
    """A backend that also computes models which are one graph."""

    def open_graph(self, model: GraphModel, n_threads: int) -> GraphSession:
        """Load the library. Raises `BackendUnavailable`."""
