"""An open ggml: threads, scratch memory, and the programs that share them."""

from __future__ import annotations

import ctypes

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import Segment
from edgelm.errors import Cancelled, EdgeLMError
from edgelm_llamacpp.ggml import STATUS_ABORTED, STATUS_SUCCESS, STRUCT_BYTES, TYPE_F32, Ggml, load
from edgelm_llamacpp.lowering import Graph, lower


class GgmlSession:
    def __init__(self, n_threads: int) -> None:
        self.ggml: Ggml = load()
        self.version = self.ggml.version
        self.n_threads = n_threads
        g = self.ggml
        self.backend = g.ggml_backend_cpu_init()
        params = ctypes.create_string_buffer(STRUCT_BYTES)
        g.ggml_threadpool_params_init(params, n_threads)
        self.threads = g.ggml_threadpool_new(params)
        g.ggml_backend_cpu_set_n_threads(self.backend, n_threads)
        g.ggml_backend_cpu_set_threadpool(self.backend, self.threads)
        # ggml asks "abort?" before every node. strlen answers from one byte of memory, without the interpreter lock.
        self._flag = ctypes.create_string_buffer(2)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p)
        g.ggml_backend_cpu_set_abort_callback(self.backend, strlen, ctypes.addressof(self._flag))
        self.allocator = g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type())
        self.reserved_bytes = 0

    def compile(self, segment: Segment, shape: PassShape) -> GgmlProgram:
        graph = lower(self.ggml, segment, shape)
        before = self.ggml.ggml_gallocr_get_buffer_size(self.allocator, 0)
        if not self.ggml.ggml_gallocr_alloc_graph(self.allocator, graph.graph):
            graph.free()
            raise MemoryError("ggml has no scratch memory for this pass")
        after = self.ggml.ggml_gallocr_get_buffer_size(self.allocator, 0)
        # a grown buffer has moved, and with it the scratch of every program compiled before
        assert after == before or self.reserved_bytes == 0, f"a program outgrew its scratch: {before} -> {after}"
        return GgmlProgram(self, graph, segment, shape)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        graph = lower(self.ggml, segment, shape)
        size = ctypes.c_size_t()
        allocator = self.ggml.ggml_gallocr_new(self.ggml.ggml_backend_cpu_buffer_type())
        self.ggml.ggml_gallocr_reserve_n_size(allocator, graph.graph, None, None, ctypes.addressof(size))
        self.ggml.ggml_gallocr_free(allocator)
        work = self.ggml.work_bytes(graph.graph, self.n_threads)
        graph.free()
        return size.value + work

    def reserve(self, scratch_bytes: int) -> None:
        g = self.ggml
        g.ggml_gallocr_free(self.allocator)  # an allocator never gives back what it has reserved once
        self.allocator = g.ggml_gallocr_new(g.ggml_backend_cpu_buffer_type())
        context = g.context(2, 8)
        graph = g.ggml_new_graph_custom(context, 8, False)
        source = g.ggml_new_tensor_1d(context, TYPE_F32, scratch_bytes // 4 + 1)
        g.pointer(source).value = 64  # bound, so that only the result needs room; it is never computed
        g.ggml_build_forward_expand(graph, g.ggml_scale(context, source, 1.0))
        done = g.ggml_gallocr_reserve(self.allocator, graph)
        g.ggml_free(context)
        if not done:
            raise MemoryError(f"no memory for {scratch_bytes} bytes of scratch")
        self.reserved_bytes = scratch_bytes

    def use_threads(self, n_threads: int) -> None:
        self.ggml.ggml_backend_cpu_set_n_threads(self.backend, n_threads)

    def rest(self) -> None:
        self.ggml.ggml_threadpool_pause(self.threads)  # the next graph wakes them

    def abort(self, on: bool) -> None:
        self._flag[0] = b"\x01" if on else b"\x00"

    def close(self) -> None:
        g = self.ggml
        if self.backend:
            g.ggml_gallocr_free(self.allocator)
            g.ggml_backend_free(self.backend)
            g.ggml_threadpool_free(self.threads)
            self.backend = None


class GgmlProgram:
    def __init__(self, session: GgmlSession, graph: Graph, segment: Segment, shape: PassShape) -> None:
        self._session, self._graph, self._order = session, graph, None
        self._bound: Bindings | None = None
        slots = dict(graph.slots)
        order = slots.pop(("order", 0), None)
        if order is not None:  # the gathered rows are taken one after the other
            self._order = (ctypes.c_int32 * shape.n_tokens)(*range(shape.n_tokens))
            for pointer in order:
                pointer.variable.value = ctypes.addressof(self._order) + pointer.offset
        self._pointers = [(kind, i, pointers) for (kind, i), pointers in slots.items()]

    def run(self, bindings: Bindings) -> None:
        if bindings is not self._bound:
            self._bind(bindings)
        status = self._session.ggml.compute(self._session.backend, self._graph.graph)
        if status == STATUS_ABORTED:
            raise Cancelled("the generation was stopped")
        if status != STATUS_SUCCESS:
            raise EdgeLMError(f"ggml failed to compute a pass (status {status}); report the model and this message")

    def _bind(self, bindings: Bindings) -> None:
        for kind, i, pointers in self._pointers:
            bound = getattr(bindings, kind)
            address = bound if isinstance(bound, int) else bound[i]
            for pointer in pointers:
                pointer.variable.value = address + pointer.offset
        self._bound = bindings

    def __del__(self) -> None:
        self._graph.free()
