"""An open ONNX Runtime: the graphs that programs share, their scratch memory, and how a run is broken off."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakValueDictionary

from edgelm.engine.backend import PassShape
from edgelm.engine.ir import RopeSpec, Segment
from edgelm.errors import Cancelled, EdgeLMError, UnsupportedModel
from edgelm.files.blocks import TYPES
from edgelm_onnx.attention import PassForm, pass_form
from edgelm_onnx.lowering import lower, usual_form
from edgelm_onnx.pieces import Pieces, cut
from edgelm_onnx.program import Angles, OnnxProgram, SharedGraph
from edgelm_onnx.runtime import Binding, Graph, library, use_arena, use_pool
from edgelm_onnx.scratch import Scratch, graph_bytes, places


class OnnxSession:
    def __init__(self, n_threads: int) -> None:
        use_pool(n_threads)
        use_arena()
        self._options = library().RunOptions()
        self._aborted = False
        self._cut = lru_cache(maxsize=8)(_pieces)
        self._lower = lru_cache(maxsize=64)(lower)
        self._graphs: dict[tuple[Segment, PassForm], SharedGraph] = {}
        self._scratch = Scratch()
        self._tables: WeakValueDictionary[object, Angles] = WeakValueDictionary()

    def compile(self, segment: Segment, shape: PassShape) -> OnnxProgram:
        """Raises `UnsupportedModel` for an operation or a tensor type that this backend lacks."""
        return OnnxProgram(self, self._cut(segment), segment, shape)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        pieces = self._cut(segment)
        between = places(pieces, segment, shape).n_bytes
        form = pass_form(shape)
        needs = (
            graph_bytes(piece, None if piece.on_host else self._lower(piece.segment, form), shape)
            for piece in dict.fromkeys(pieces.pieces)
        )
        return between + max(needs, default=0)

    def reserve(self, scratch_bytes: int) -> None:
        self._graphs.clear()

    def use_threads(self, n_threads: int) -> None:
        """ONNX Runtime cannot change its threads: all passes run with those of the first session of the process."""

    def abort(self, on: bool) -> None:
        self._aborted = on
        self._options.terminate = on

    def close(self) -> None:
        self._graphs.clear()
        self._scratch.release()

    # --- for programs

    def graph(self, segment: Segment, form: PassForm) -> SharedGraph:
        """Return the graph of a piece for passes of this form; equal pieces share one."""
        key = segment, usual_form(segment, form)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = SharedGraph(self._lower(*key))
        return graph

    @contextmanager
    def running(self) -> Iterator[Callable[[Graph, Binding], None]]:
        """Give a function that runs a graph; a run that is broken off raises `Cancelled` here."""
        options = self._options
        self.check()
        try:
            yield lambda graph, binding: graph.session.run_with_iobinding(binding.raw, options)
        except RuntimeError as exc:
            self.check()
            raise EdgeLMError(f"ONNX Runtime failed in a pass ({exc}); report the model and this message") from exc

    def check(self) -> None:
        """Raises `Cancelled` while runs are to be broken off."""
        if self._aborted:
            raise Cancelled("the generation was stopped")

    def angles(self, spec: RopeSpec, factors: int | None, n_tokens: int) -> Angles:
        """Return the table of a rotation; programs of passes of one width share it."""
        key = (spec._replace(n_heads=1, neox=True), factors, n_tokens)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = Angles(spec, factors, n_tokens)
        return table

    def scratch(self, n_bytes: int) -> int:
        """Return the address of memory that values between pieces may use."""
        return self._scratch.at_least(n_bytes)


def _pieces(segment: Segment) -> Pieces:
    for weight in segment.weights:
        if weight.type not in TYPES:
            raise UnsupportedModel(f"the onnx backend cannot read {weight.type.name} weights; use another quantization")
    return cut(segment)
