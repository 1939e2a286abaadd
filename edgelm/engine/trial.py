"""What a child process does to find out whether a backend can be trusted: all that the host would do first.

Imports it, asks it, opens it, and compares small products with numbers that are known. May crash or hang; needs no
NumPy, so that it is quick and takes little of a memory limit that it shares.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from edgelm.engine.backend import Adopting, Backend, Bindings, CacheGroup, PassShape, Session, layout_of
from edgelm.engine.health import identity, loaded_version
from edgelm.engine.ir import AttendSpec, NormSpec, Op, Segment, Value, Weight
from edgelm.engine.registry import get_backend
from edgelm.errors import BackendUnavailable, EdgeLMError
from edgelm.files.ggml_types import TensorType
from edgelm.files.model import TensorInfo

WIDTH, ROWS, HEAD_DIM, PLACES = 256, 64, 32, 32
WRONG = 1e-2
"""Mean squared error, as a share of the mean square, from which numbers are wrong: eight bits are off by 1e-4."""
_BLOCK = 32
_BYTES = 4 << 20


class _Product(NamedTuple):
    """A segment of one operation, what it is bound to, and what must come out."""

    what: str
    segment: Segment
    inputs: tuple[Sequence[float], ...]
    weight: bytes
    expected: Sequence[float]


def trial(name: str, report: Callable[..., None]) -> None:
    """Try the backend of this name and `report` its identity, then the verdict. Raises whatever the backend raises."""
    try:
        backend = get_backend(name)
    except BackendUnavailable as exc:
        report(available=False, reason=exc.reason, version="", done=True)
        return
    before = identity(backend)
    report(identity=before)  # from here on, it can be imported without harm
    found = backend.probe()
    if not found.available:
        report(available=False, reason=found.reason, version=found.version, graphs=found.graphs, done=True)
        return
    report(version=found.version)
    problem = problem_of(backend, found.version)
    if not problem and identity(backend) != before:
        problem = "its library changed while it was tried"
    report(available=not problem, reason=problem, broken=bool(problem), done=True)


def problem_of(backend: Backend, version: str) -> str:
    """Open the backend and compute with it; return in a sentence what is wrong, or nothing."""
    try:
        session = backend.open(1)
    except EdgeLMError as exc:
        return f"it says that it works, but cannot be opened: {getattr(exc, 'reason', exc)}"
    try:
        loaded = loaded_version(session)
        if loaded and loaded != version:
            return f"it says that it is {version}, but what it loads is {loaded}"
        types = backend.capabilities().types
        for product in (*(_linear(kind) for kind in _ROWS if kind in types), _norm(), _attend()):
            error = _error(backend, session, product)
            if not error <= WRONG:  # not a number is wrong, too
                return f"{version} computes wrong results here: {product.what} is off by {math.sqrt(error):.0%}"
    finally:
        session.close()
    return ""


def _error(backend: Backend, session: Session, product: _Product) -> float:
    """Compute; return the mean squared error over the mean square."""
    memory, segment = _Memory(), product.segment
    shape = PassShape(1, 1, (CacheGroup(PLACES, PLACES),) * segment.n_layers)
    session.reserve(session.scratch_bytes(segment, shape))
    program = session.compile(segment, shape)
    n_out = len(product.expected)
    y = memory.put(struct.pack(f"{n_out}f", *[math.nan] * n_out))
    cache = bytes(PLACES * HEAD_DIM * 4)
    is_matrix = any(op.kind == "linear" for op in segment.ops)
    weights = [(w, memory.put(_laid_out(backend, w, product.weight)), is_matrix) for w in segment.weights]
    with _handed_over(session, weights) as handed:
        program.run(
            Bindings(
                inputs=tuple(memory.put(struct.pack(f"{len(x)}f", *x)) for x in product.inputs),
                outputs=(y,),
                weights=handed,
                keys=tuple(memory.put(cache) for _ in range(segment.n_layers)),
                values=tuple(memory.put(cache) for _ in range(segment.n_layers)),
                positions=memory.put(bytes(4)),
                out_rows=memory.put(bytes(4)),
                places=(memory.put(bytes(8)),) * segment.n_layers,
                masks=(memory.put(struct.pack(f"{PLACES}f", 0.0, *[-math.inf] * (PLACES - 1))),) * segment.n_layers,
            )
        )
    ours = (ctypes.c_float * n_out).from_address(y)[:]
    off = sum((a - b) ** 2 for a, b in zip(ours, product.expected, strict=True))
    return off / sum(b * b for b in product.expected)


def _handed_over(session: Session, weights: list[tuple[Weight, int, bool]]) -> AbstractContextManager[tuple[int, ...]]:
    """Give what stands for these weights (address, is it a matrix?) in bindings: copies, if the session keeps some."""
    if not isinstance(session, Adopting):
        return nullcontext(tuple(address for _, address, _ in weights))
    from edgelm.engine.adopting import handed_over  # brings NumPy along, as such backends do

    return handed_over(session, weights)


def _laid_out(backend: Backend, weight: Weight, rows: bytes) -> bytes | bytearray:
    """Return the rows of a weight as the backend wants them."""
    layout = layout_of(backend)
    if layout is None:
        return rows
    from edgelm.engine.preparing import packed_bytes  # brings NumPy along, as such backends do

    return packed_bytes(layout, TensorInfo("", weight.type, (weight.width, weight.rows), 0, 0, len(rows)), rows)


class _Memory:
    """Arrays on pages of their own, at the beginning of one."""

    def __init__(self) -> None:
        self._block, self._used = mmap.mmap(-1, _BYTES), 0
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._block))

    def put(self, data: bytes | bytearray) -> int:
        at = self._used
        self._block[at : at + len(data)] = data
        self._used += -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
        return self._address + at


def _numbers(seed: int, n: int, spread: int) -> list[int]:
    """Return `n` whole numbers from -spread to spread that follow no pattern (a linear congruential generator)."""
    numbers = []
    for _ in range(n):
        seed = (seed * 1103515245 + 12345) % 2**31
        numbers.append((seed >> 16) % (2 * spread + 1) - spread)
    return numbers


def _blocks(values: Sequence[int]) -> Iterator[Sequence[int]]:
    return (values[i : i + _BLOCK] for i in range(0, len(values), _BLOCK))


def _q8_0(values: Sequence[int]) -> bytes:
    return b"".join(struct.pack(f"<e{_BLOCK}b", 1.0, *block) for block in _blocks(values))


def _q4_0(values: Sequence[int]) -> bytes:
    half = _BLOCK // 2
    return b"".join(
        struct.pack(f"<e{half}B", 1.0, *(low + 8 | high + 8 << 4 for low, high in zip(b[:half], b[half:], strict=True)))
        for b in _blocks(values)
    )


_ROWS: dict[TensorType, Callable[[Sequence[int]], bytes]] = {
    TensorType.F32: lambda values: struct.pack(f"<{len(values)}f", *values),
    TensorType.F16: lambda values: struct.pack(f"<{len(values)}e", *values),
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_0: _q4_0,
}
"""How whole numbers from -8 to 7 are written in each type, without a loss."""


def _linear(kind: TensorType) -> _Product:
    x, w = _numbers(1, WIDTH, 9), _numbers(2, WIDTH * ROWS, 7)
    weight = Weight("", kind, WIDTH, ROWS)
    values = (Value(WIDTH, "token"), Value(ROWS, "token"))
    segment = Segment((Op("linear", (0,), 1, (weight,)),), values, (0,), (1,), (weight,), 0)
    rows = (w[i : i + WIDTH] for i in range(0, len(w), WIDTH))
    expected = [float(sum(a * b for a, b in zip(x, row, strict=True))) for row in rows]
    return _Product(f"a product with {kind.name} weights", segment, (x,), _ROWS[kind](w), expected)


def _norm() -> _Product:
    x, scale, eps = _numbers(3, WIDTH, 9), _numbers(4, WIDTH, 7), 1e-5
    weight = Weight("", TensorType.F32, WIDTH, 1)
    values = (Value(WIDTH, "token"),) * 2
    segment = Segment((Op("rms_norm", (0,), 1, (weight,), NormSpec(eps)),), values, (0,), (1,), (weight,), 0)
    rms = math.sqrt(sum(a * a for a in x) / WIDTH + eps)
    expected = [a / rms * b for a, b in zip(x, scale, strict=True)]
    return _Product("a norm", segment, (x,), _ROWS[TensorType.F32](scale), expected)


def _attend() -> _Product:
    """Attention over a cache of one place: what comes out is the value that went in, for each of two heads."""
    q, k, v = (_numbers(seed, n, 9) for seed, n in ((5, 2 * HEAD_DIM), (6, HEAD_DIM), (7, HEAD_DIM)))
    spec = AttendSpec(0, 2, 1, HEAD_DIM, HEAD_DIM, HEAD_DIM**-0.5)
    values = tuple(Value(width, "token") for width in (len(q), len(k), len(v), len(q)))
    segment = Segment((Op("attend", (0, 1, 2), 3, (), spec),), values, (0, 1, 2), (3,), (), 1)
    return _Product("attention", segment, (q, k, v), b"", [float(x) for x in v * 2])
