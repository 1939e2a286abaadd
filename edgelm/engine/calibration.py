"""How fast this device computes, measured in a moment and kept on disk; `reading` does the same for its flash.

Matrices and a small transformer block are computed by the session that will run the model. Happens before a model's
memory is planned, in little memory that is given back. Plans nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.adopting import handed_over
from edgelm.engine.backend import (
    Adopting,
    Backend,
    Bindings,
    CacheGroup,
    CacheLayout,
    PassShape,
    Program,
    Session,
    WeightLayout,
    layout_of,
)
from edgelm.engine.health import identity
from edgelm.engine.ir import AttendSpec, NormSpec, Op, RopeSpec, Segment, Value, Weight
from edgelm.engine.machine import digest, last_cache_bytes, machine_key
from edgelm.files.ggml_types import TensorType, row_bytes
from edgelm.files.model import ModelFile, TensorInfo
from edgelm.memory.buffer import PAGE, Buffer, align_up
from edgelm.memory.predict import Rates
from edgelm.memory.stores import Store
from edgelm.sizes import MB, MIB

LIMIT_BYTES = 20 * MB
"""Memory that measuring may take, unless the caller allows more or less."""
KEPT_S = 86_400.0
"""How long a measurement is believed: drives fill up, processors get hot, machines get other work."""
STEADY = 1.3
"""How much slower than the best eighth of repeats the middle one may be for a measurement to be kept."""
MAX_COMPUTE_BYTES, COMPUTE_S, BUSY_S = 64 * MIB, 0.03, 0.1
PIECE_BYTES = 1 * MIB
WIDE = 32
"""Tokens of the products that say how fast wide passes are."""
LEAST_SHARE = 8
N_TYPES = 4
"""Tensor types measured, those with the most bytes; the others are taken to be as fast as these."""
_BLOCKS = 4
_HOW = ("from memory", "from cache")
_ENOUGH = 3


def measured_rates(
    backend: Backend,
    session: Session,
    file: ModelFile,
    n_threads: int,
    flash_bytes_per_s: float,
    *,
    limit_bytes: int = LIMIT_BYTES,
    reads: tuple[Store, ModelFile] | None = None,
) -> Rates:
    """Return what the device does with this model: kernels for its tensor types, and the cost of a pass.

    The speed of its flash is taken over as given. With `reads`, a store and the model whose files it reads, it is also
    measured how much reading holds computing up.

    Takes up to 0.3 s the first time on a machine, later a few milliseconds; at most `limit_bytes` of memory (no less
    than 5 MB), which is returned to the system. If the limit is 5 MiB above twice the processor's last cache (or
    64 MiB), weights are measured as they come from memory; else from caches, and the rate is too high by what those
    gain. A budget that holds all weights has room for the former. Measures again every time where the cache folder
    refuses, or where the machine was too busy for repeats to agree.
    """
    shares = _shares(file)
    kernels = _Kernels(backend, session, n_threads, limit_bytes)
    seconds_per_byte = sum(share / kernels.bytes_per_s(*matrix) for matrix, share in shares.items())
    blocks = _shares(file, head=False).items()
    wide_seconds_per_byte = sum(share / kernels.bytes_per_s(*matrix, WIDE) for matrix, share in blocks)
    n_matrices = sum(1 for info in file.tensors.values() if info.n_rows > 1)
    return Rates(
        flash_bytes_per_s=flash_bytes_per_s,
        compute_bytes_per_s=1 / seconds_per_byte,
        wide_bytes_per_s=1 / wide_seconds_per_byte,
        pass_overhead_s=kernels.overhead_s() * n_matrices,
        token_overhead_s=kernels.overhead_s(WIDE) * n_matrices / WIDE,
        read_cost_s_per_byte=kernels.read_cost_s_per_byte(*reads) if reads else 0.0,
        steady=kernels.steady,
    )


class _Kernels:
    """What a session computes a second; measured when it is asked for and not known."""

    def __init__(self, backend: Backend, session: Session, n_threads: int, limit_bytes: int) -> None:
        wanted = min(2 * last_cache_bytes(), MAX_COMPUTE_BYTES)
        self._n_bytes = max(min(wanted, limit_bytes - 5 * MIB), PIECE_BYTES)
        self._trial = _Trial(session, layout_of(backend), backend.capabilities().cache)
        what = (backend.name, identity(backend), self._trial.key, n_threads)
        places = [_place("kernels", *what, how, machine_key()) for how in _HOW]
        self._path = places[self._n_bytes < wanted]
        # what was measured with more room is better than what little room would tell
        self._known = _kept(places[1]) | _kept(places[0])
        self.steady = True

    def bytes_per_s(self, kind: TensorType, width: int, n_tokens: int = 1) -> float:
        """Bytes of weights times tokens a second."""
        name = f"{kind.name} {width}" + (f" x {n_tokens}" if n_tokens > 1 else "")
        rate = self._get(name, lambda: _matrix_rate(self._trial, kind, width, self._n_bytes, n_tokens))
        if n_tokens == 1 and name not in self._known:
            # short products suffer most from a busy machine; no kernel at hand does less than this for one row
            return max(rate, self.bytes_per_s(kind, width, WIDE) / LEAST_SHARE)
        return rate

    def overhead_s(self, n_tokens: int = 1) -> float:
        """Seconds that a matrix costs beside its bytes: starting kernels, and the small operations around it."""
        name = "overhead_s" + (f" x {n_tokens}" if n_tokens > 1 else "")
        return self._get(name, lambda: _block_s(self._trial, n_tokens))

    def read_cost_s_per_byte(self, store: Store, file: ModelFile) -> float:
        """Seconds that every byte which is read meanwhile adds to computing: interrupts, readers, memory."""
        return self._get("read_cost_s_per_byte", lambda: _read_cost_s_per_byte(self._trial, store, file))

    def _get(self, name: str, measure: Callable[[], tuple[float, bool]]) -> float:
        if name in self._known:
            return self._known[name]
        value, steady = measure()
        self.steady &= steady
        if steady:
            self._known[name] = value
            _keep(self._path, _kept(self._path) | {name: value})
        return value


class _Trial:
    """A session to be measured, and how its backend wants weights and caches."""

    def __init__(self, session: Session, layout: WeightLayout | None, cache: CacheLayout) -> None:
        self.session, self._layout, self.cache_item_bytes = session, layout, {"f16": 2, "f32": 4}[cache.item]
        self.key = layout.key if layout is not None else ""

    def matrix(self, weight: Weight, byte: int) -> bytes | bytearray:
        """Return a matrix all of whose bytes in a file would be `byte`, as the session wants it."""
        n_bytes = weight.rows * row_bytes(weight.type, weight.width)
        info = TensorInfo("", weight.type, (weight.width, weight.rows), 0, 0, n_bytes)
        if self._layout is None:
            return bytes([byte]) * n_bytes
        from edgelm.engine.preparing import packed_bytes

        return packed_bytes(self._layout, info, bytes([byte]) * n_bytes)

    @contextmanager
    def bound(
        self, segment: Segment, shape: PassShape, places: Sequence[Bindings]
    ) -> Iterator[tuple[Program, list[Bindings]]]:
        """Give a program and bindings for each of `places`, the weights handed over to the session."""
        program = self.session.compile(segment, shape)
        first = [op.kind == "linear" and i == 0 for op in segment.ops for i in range(len(op.weights))]
        with ExitStack() as held:
            bound = []
            for place in places:
                weights = list(zip(segment.weights, place.weights, first, strict=True))
                bound.append(place._replace(weights=held.enter_context(handed_over(self.session, weights))))
            yield program, bound


def _matrix_rate(trial: _Trial, kind: TensorType, width: int, n_bytes: int, n_tokens: int) -> tuple[float, bool]:
    """Bytes times tokens a second of products with matrices of this type and width; `n_bytes` are visited in turn.

    Also says whether the measurements agree: on a busy machine threads wait for each other for whole time slices.
    Many short products rather than a few long ones, so that some of them are not interrupted.
    """
    rows = max(PIECE_BYTES // row_bytes(kind, width) // 32 * 32, 32)
    weight = Weight("", kind, width, rows)
    # Ones are small, ordinary numbers in every type: no NaN, and as float32 no denormals, which are slow.
    content = trial.matrix(weight, 1)
    piece = align_up(len(content))
    n_pieces = max(n_bytes // piece, 1)
    apart = not isinstance(trial.session, Adopting)  # who copies may copy the same piece again
    with (
        Buffer(piece * n_pieces if apart else piece, huge=True) as weights,
        Buffer((width + rows) * 4 * n_tokens) as state,
    ):
        # every page written once: unwritten ones would all be the same page of zeros, and never leave the cache
        for at in range(0, weights.n_bytes, piece):
            weights.view[at : at + len(content)] = content
        (ctypes.c_float * (width * n_tokens)).from_address(state.address)[:] = [1.0] * (width * n_tokens)
        x, y = state.address, state.address + width * n_tokens * 4
        values = (Value(width, "token"), Value(rows, "token"))
        segment = Segment((Op("linear", (0,), 1, (weight,)),), values, (0,), (1,), (weight,), 0)
        places = [weights.address + i * piece * apart for i in range(n_pieces)]
        unbound = [Bindings((x,), (y,), (at,), (), (), 0, 0, (), ()) for at in places]
        with trial.bound(segment, PassShape(n_tokens, 1, ()), unbound) as (program, bound):
            seconds, steady = _usual_s(program, bound)
    return n_tokens * len(content) / seconds, steady


def _block_s(trial: _Trial, n_tokens: int) -> tuple[float, bool]:
    """Seconds of a transformer block with matrices too small to count, for each of its seven matrices."""
    heads, head_dim, width, hidden, places = 8, 64, 32, 1024, 256
    wide = heads * head_dim
    norm, rope = NormSpec(1e-5), RopeSpec(heads, head_dim, True, 10_000.0)
    ops: list[Op] = []
    widths = [width]

    def add(kind: str, *inputs: int, out: int, weight: Weight | None = None, params: Any = None) -> int:
        widths.append(out)
        ops.append(Op(kind, inputs, len(widths) - 1, (weight,) if weight else (), params))
        return len(widths) - 1

    def linear(x: int, rows: int) -> int:
        return add("linear", x, out=rows, weight=Weight("", TensorType.F16, widths[x], rows))

    x = 0
    for layer in range(_BLOCKS):
        scale = Weight("", TensorType.F32, width, 1)
        h = add("rms_norm", x, out=width, weight=scale, params=norm)
        q, k, v = linear(h, wide), linear(h, wide), linear(h, wide)
        q, k = (add("rope", y, out=wide, params=rope) for y in (q, k))
        spec = AttendSpec(layer, heads, heads, head_dim, head_dim, head_dim**-0.5)
        x = add("add", x, linear(add("attend", q, k, v, out=wide, params=spec), width), out=width)
        h = add("rms_norm", x, out=width, weight=scale, params=norm)
        h = add("gate", linear(h, hidden), linear(h, hidden), out=hidden, params="silu")
        x = add("add", x, linear(h, width), out=width)
    weights = tuple(weight for op in ops for weight in op.weights)
    values = tuple(Value(n, "token") for n in widths)
    segment = Segment(tuple(ops), values, (0,), (x,), weights, _BLOCKS)
    matrices = {weight: trial.matrix(weight, 0) for weight in dict.fromkeys(weights) if weight.rows > 1}
    cache_bytes = wide * places * trial.cache_item_bytes
    x_bytes, mask_bytes = align_up(n_tokens * width * 4), align_up(n_tokens * places * 4)
    small_bytes = 2 * x_bytes + PAGE + mask_bytes
    matrix_bytes = sum(align_up(len(content)) for content in matrices.values())
    with Buffer(small_bytes + 2 * cache_bytes + matrix_bytes) as memory:
        small = memory.address  # zeros: input, output, positions and places, masks
        keys, at = small + small_bytes, small_bytes + 2 * cache_bytes
        starts = {}
        for weight, content in matrices.items():
            memory.view[at : at + len(content)] = content
            starts[weight] = memory.address + at
            at += align_up(len(content))
        unbound = Bindings(
            inputs=(small,),
            outputs=(small + x_bytes,),
            weights=tuple(starts.get(weight, small) for weight in weights),
            keys=(keys,) * _BLOCKS,
            values=(keys + cache_bytes,) * _BLOCKS,
            positions=small + 2 * x_bytes,
            out_rows=small + 2 * x_bytes,
            places=(small + 2 * x_bytes,),
            masks=(small + 2 * x_bytes + PAGE,),
        )
        shape = PassShape(n_tokens, 1, (CacheGroup(places, places),))
        with trial.bound(segment, shape, [unbound]) as (program, bound):
            seconds, steady = _usual_s(program, bound)
    return seconds / (7 * _BLOCKS), steady


def _read_cost_s_per_byte(trial: _Trial, store: Store, file: ModelFile) -> tuple[float, bool]:
    """Compute a wide product for a moment alone and for a moment beside two readers; also says whether that agreed."""
    width, rows, block = 1024, 512, 1 * MIB
    number = file.main_part
    places = range(0, max(file.file_bytes[number] - block, 1), block)
    n_bytes = min(block, file.file_bytes[number])
    stop, n_read = threading.Event(), [0, 0]
    weight = Weight("", TensorType.F16, width, rows)
    matrix = trial.matrix(weight, 0)
    x_at = align_up(len(matrix))
    with Buffer(x_at + WIDE * (width + rows) * 4) as state, Buffer(4 * MIB, huge=True) as slots:
        state.view[: len(matrix)] = matrix

        def read(reader: int) -> None:
            for place in itertools.cycle(places[reader::2] or places):
                if stop.is_set():
                    return
                store.read_into(number, place, n_bytes, slots.view, reader * 2 * MIB)
                n_read[reader] += n_bytes

        values = (Value(width, "token"), Value(rows, "token"))
        segment = Segment((Op("linear", (0,), 1, (weight,)),), values, (0,), (1,), (weight,), 0)
        x = state.address + x_at
        unbound = Bindings((x,), (x + WIDE * width * 4,), (state.address,), (), (), 0, 0, (), ())
        with trial.bound(segment, PassShape(WIDE, 1, ()), [unbound]) as (program, bound):
            alone, steady = _usual_s(program, bound)
            readers = [threading.Thread(target=read, args=(i,), daemon=True) for i in range(2)]
            for reader in readers:
                reader.start()
            began, n_runs = time.perf_counter(), 0
            while (elapsed := time.perf_counter() - began) < BUSY_S:
                program.run(bound[0])
                n_runs += 1
            n_done = sum(n_read)
            stop.set()
            for reader in readers:
                reader.join()
    return max(elapsed - n_runs * alone, 1e-9) / max(n_done, 1), steady and n_done > 0


def _usual_s(program: Program, places: Sequence[Bindings]) -> tuple[float, bool]:
    """Return the seconds of a run that nothing disturbs, and whether enough of the runs were undisturbed."""
    program.run(places[0])  # pays for pages and for threads that wake up
    clean: list[float] = []
    disturbed: list[float] = []
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < COMPUTE_S or (len(clean) < _ENOUGH and elapsed < BUSY_S):
        switches, start = _switches(), time.perf_counter()
        program.run(places[len(clean) % len(places)])
        seconds = time.perf_counter() - start
        if _switches() == switches:
            clean.append(seconds)
        else:
            disturbed.append(seconds)
            time.sleep(0.002)  # schedulers favour who has just waited: the next run has a better chance
    times = sorted(clean or disturbed)
    best, usual = times[len(times) // 8], times[len(times) // 2]
    steady = len(clean) >= _ENOUGH and usual < STEADY * best
    return usual if steady else best, steady  # what else the machine does can only add


def _switches() -> int:
    """How often a thread of this process had to make way for another process; 0 where the system does not count."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _shares(file: ModelFile, head: bool = True) -> dict[tuple[TensorType, int], float]:
    """Return the types of most of the weights of a pass, each with its most usual width, and their shares of bytes.

    `head=False`: without the output head, of which a prompt computes one row.
    """
    output = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"
    sizes: Counter[TensorType] = Counter()
    widths: dict[TensorType, Counter[int]] = {}
    for info in file.tensors.values():
        # of an embedding that is not the output head too, a pass takes single rows
        used = info.name != "token_embd.weight" or output == "token_embd.weight"
        if info.n_rows > 1 and used and (head or info.name != output):
            sizes[info.type] += info.n_bytes
            widths.setdefault(info.type, Counter())[info.shape[0]] += info.n_bytes
    largest = sizes.most_common(N_TYPES)
    total = sum(n_bytes for _, n_bytes in largest)
    return {(kind, widths[kind].most_common(1)[0][0]): n_bytes / total for kind, n_bytes in largest}


def _place(what: str, *facts: object) -> Path:
    return cache_dir() / "rates" / f"{what}-{digest(*facts)}.json"


def _kept(path: Path) -> dict[str, float]:
    found = read_json(path) or {}
    with suppress(AttributeError, KeyError, TypeError, ValueError):  # a file of another make
        if 0 <= time.time() - float(found["measured_at_s"]) < KEPT_S:
            return {str(name): float(value) for name, value in found["rates"].items() if float(value) > 0}
    return {}


def _keep(path: Path, rates: dict[str, float]) -> None:
    write_json(path, {"measured_at_s": time.time(), "rates": rates})
