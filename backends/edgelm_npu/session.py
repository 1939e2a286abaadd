"""Programs of the simulated NPU: stages in the order that the schedule found, on memory that chunks do not share.

The processor's stages are computed by edgelm's NumPy backend, the NPU's in 8-bit integers, here, by the same
processor. Nothing is slowed down or sped up: only the order comes from the table of devices.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings, PassShape, Program
from edgelm.engine.ir import Op, Placed, Segment
from edgelm.engine.lanes import Lanes, quiet
from edgelm.errors import UnsupportedModel
from edgelm.files.blocks import TYPES, dequantize
from edgelm.files.ggml_types import row_bytes
from edgelm_npu.cost import tasks
from edgelm_npu.devices import DEFAULT, DEVICES, NpuDevice
from edgelm_npu.layout import row_bytes as packed_row_bytes
from edgelm_npu.lowering import CHUNK, Stage, Work, n_chunks, stages, work_of
from edgelm_npu.numbers import Floats, Outliers
from edgelm_npu.products import Product, Space
from edgelm_npu.schedule import out_of_order
from edgelm_numpy.frame import at
from edgelm_numpy.session import ALIGNMENT, NumpySession

if TYPE_CHECKING:
    from edgelm_npu.compiled import CompiledProducts

FLOAT_BYTES = 4


class NpuSession:
    """Computes as an NPU and the processor beside it would, on this processor.

    `device` is the one of the table whose times decide the order.
    """

    def __init__(self, n_threads: int, device: NpuDevice = DEVICES[DEFAULT]) -> None:
        self.host, self.device = _Host(n_threads), device

    @property
    def lanes(self) -> Lanes:
        return self.host.lanes

    def compile(self, segment: Segment, shape: PassShape) -> Program:
        """Lower a segment. Raises `UnsupportedModel` for a matrix of a type that cannot be converted to 8 bits."""
        return NpuProgram(self.host, segment, shape, self.device)

    def scratch_bytes(self, segment: Segment, shape: PassShape) -> int:
        return _Recipe.of(self.host, segment, shape).scratch_bytes

    def reserve(self, scratch_bytes: int) -> None:
        self.host.front_bytes = 0
        self.host.reserve(scratch_bytes)

    def use_threads(self, n_threads: int) -> None:
        self.host.use_threads(n_threads)

    def abort(self, on: bool) -> None:
        self.host.abort(on)

    def close(self) -> None:
        self.host.close()


class _Host(NumpySession):
    """The processor's part. The first `front_bytes` of its scratch memory are the NPU program's that runs."""

    front_bytes = 0
    compiled: CompiledProducts | None = None
    """A device that computes products in 8 bits, if this processor does not in its place."""

    def scratch(self, n_bytes: int) -> NDArray[np.uint8]:
        return super().scratch(self.front_bytes + n_bytes)[self.front_bytes :]


@dataclass(frozen=True, slots=True)
class _Recipe:
    """Stages, and the memory of a pass: a block for each chunk, then what products use, then the processor's part.

    `offsets`: where a value lies in its block; `block_bytes`: the blocks of chunks of tokens, and of wanted rows.
    """

    parts: tuple[Stage, ...]
    offsets: dict[int, int]
    block_bytes: dict[str, int]
    n_tokens: int
    n_outputs: int
    space: Space
    host_bytes: int

    @property
    def blocks_bytes(self) -> int:
        rows = {"token": self.n_tokens, "output": self.n_outputs}
        return sum(n_chunks(rows[per]) * n_bytes for per, n_bytes in self.block_bytes.items())

    @property
    def own_bytes(self) -> int:
        return self.blocks_bytes + _aligned(self.space.n_bytes)

    @property
    def scratch_bytes(self) -> int:
        return self.own_bytes + max(self.host_bytes, self.space.heap_bytes)

    @classmethod
    def of(cls, host: NumpySession, segment: Segment, shape: PassShape) -> _Recipe:
        for weight in segment.weights:
            if weight.type not in TYPES:
                raise UnsupportedModel(
                    f"the npu backend cannot read {weight.type.name} weights; use another quantization"
                )
        if alone := next((op.kind for op in segment.ops if op.kind in ("encode", "add_positions")), None):
            raise UnsupportedModel(
                f"the npu backend takes a text in chunks and has no operation {alone!r}, which needs all of it; "
                "use another backend"
            )
        parts = _stages(segment)
        inner = {
            (part.placed.segment, _inner(part, min(CHUNK, shape.rows(part.per)), shape))
            for part in parts
            if part.placed is not None
        }
        host_bytes = max((host.scratch_bytes(*one) for one in inner), default=0)
        space = Space.of(parts, max(shape.n_tokens, shape.n_outputs), host.lanes.n)
        offsets, block_bytes = _places(parts, segment, shape)
        return cls(parts, offsets, block_bytes, shape.n_tokens, shape.n_outputs, space, host_bytes)


@lru_cache(maxsize=64)
def _stages(segment: Segment) -> tuple[Stage, ...]:
    return stages(segment)


def _inner(part: Stage, rows: int, shape: PassShape) -> PassShape:
    """Return the shape of one chunk for the processor's part."""
    return PassShape(rows, 1, shape.groups) if part.per == "token" else PassShape(1, rows, shape.groups)


def _places(parts: tuple[Stage, ...], segment: Segment, shape: PassShape) -> tuple[dict[int, int], dict[str, int]]:
    """Give every value that passes between stages an offset in its chunk's block that no living value covers.

    What a select reads lives to the end: it waits for chunks that come later.
    """
    made_in: dict[int, int] = {}
    last_use: dict[int, int] = {}
    for i, part in enumerate(parts):
        for op in part.ops:
            made_in[op.output] = i
            for value in op.inputs:
                last_use[value] = len(parts) if part.kind == "select" else i
    inside_of_one = {op.output for part in parts if part.placed for op in part.ops} - {
        value for part in parts if part.placed for value in part.placed.outputs
    }
    bound = {*segment.inputs, *segment.outputs, *inside_of_one}

    def size(value: int) -> int:
        described = segment.values[value]
        return _aligned(FLOAT_BYTES * min(CHUNK, shape.rows(described.per)) * described.width)

    offsets: dict[int, int] = {}
    block_bytes = {"token": 0, "output": 0}
    for value, stage in made_in.items():  # in the order of stages
        if value in bound:
            continue
        per, start = segment.values[value].per, 0
        for other in sorted(offsets, key=offsets.__getitem__):
            if segment.values[other].per != per or last_use.get(other, -1) < stage:
                continue
            if start + size(value) <= offsets[other]:
                break
            start = max(start, offsets[other] + size(other))
        offsets[value] = start
        block_bytes[per] = max(block_bytes[per], start + size(value))
    return offsets, block_bytes


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


class NpuProgram:
    """A compiled segment; `schedule` has the simulated times of a pass."""

    def __init__(self, host: _Host, segment: Segment, shape: PassShape, device: NpuDevice) -> None:
        self.host, self.segment, self.shape = host, segment, shape
        self.recipe = recipe = _Recipe.of(host, segment, shape)
        work = work_of(recipe.parts, shape.n_tokens, shape.n_outputs)
        self.schedule = out_of_order(tasks(work, recipe.parts, segment, shape, device), device.sync_s)
        self._work = [work[i] for i in self.schedule.order]
        programs: dict[tuple[Segment, PassShape], Program] = {}
        self.programs: dict[tuple[int, int], Program] = {}
        for one in work:
            part = recipe.parts[one.stage]
            if part.placed is not None:
                key = part.placed.segment, _inner(part, one.rows, shape)
                if key not in programs:
                    programs[key] = host.compile(*key)
                self.programs[one.stage, one.rows] = programs[key]

    def run(self, bindings: Bindings) -> None:
        host, recipe = self.host, self.recipe
        host.front_bytes = 0
        block = host.scratch(recipe.own_bytes + recipe.host_bytes)  # were it to grow later, values would be lost
        host.front_bytes = recipe.own_bytes
        run = _Run(self, bindings, block)
        with quiet():
            for one in self._work:
                host.lanes.check()
                run.do(one)


class _Run:
    """One run of a program: where everything lies."""

    def __init__(self, program: NpuProgram, bindings: Bindings, block: NDArray[np.uint8]) -> None:
        self._program, self._bindings, recipe = program, bindings, program.recipe
        self._segment, self._recipe = program.segment, recipe
        self._base = block.ctypes.data
        self._products = block[recipe.blocks_bytes : recipe.own_bytes].view(np.float32)
        self._bound = dict(zip(self._segment.inputs, bindings.inputs, strict=True))
        self._bound.update(zip(self._segment.outputs, bindings.outputs, strict=True))
        self._begun: set[tuple[int, int]] = set()

    def do(self, work: Work) -> None:
        part = self._recipe.parts[work.stage]
        if part.kind == "select":
            for op in part.ops:
                self._select(op, work.rows)
        elif part.placed is not None:
            self._on_the_processor(work, part.placed, part)
        else:
            self._product(work, part)

    def _product(self, work: Work, part: Stage) -> None:
        add = (work.stage, work.chunk) in self._begun
        self._begun.add((work.stage, work.chunk))
        host, space = self._program.host, self._recipe.space
        found: dict[int, Outliers] = {}  # of inputs that several products of the stage share
        for op, first in zip(part.ops, part.weights, strict=True):
            matrix, *biases = op.weights
            x, out = (self._rows(value, work.chunk, work.rows) for value in (op.inputs[0], op.output))
            if op.inputs[0] not in found:
                found[op.inputs[0]] = Outliers.of(x)
            raw = at(self._bindings.weights[first], (matrix.rows * packed_row_bytes(matrix.width),), np.uint8)
            product = Product(x, found[op.inputs[0]], out, raw, space, self._products, host.lanes, host.compiled)
            if work.part == "outliers":
                product.of_outliers(add)
            else:
                product.on_the_npu(add)
            for bias in biases if add else ():
                numbers = at(self._bindings.weights[first + 1], (1, row_bytes(bias.type, bias.width)), np.uint8)
                out += dequantize(bias.type, numbers)[0]

    def _on_the_processor(self, work: Work, placed: Placed, part: Stage) -> None:
        bound, start = self._bindings, work.chunk * CHUNK
        weights = (
            bound.weights[first + i] + (start * row_bytes(weight.type, weight.width) if op.kind == "embed" else 0)
            for op, first in zip(part.ops, part.weights, strict=True)
            for i, weight in enumerate(op.weights)
        )
        inner = Bindings(
            tuple(self._address(value, work.chunk) for value in placed.inputs),
            tuple(self._address(value, work.chunk) for value in placed.outputs),
            tuple(weights),
            tuple(bound.keys[layer] for layer in placed.layers),
            tuple(bound.values[layer] for layer in placed.layers),
            bound.positions + 4 * start,
            bound.out_rows,
            tuple(address + 8 * start for address in bound.places),
            tuple(
                address + 4 * start * group.length
                for address, group in zip(bound.masks, self._program.shape.groups, strict=True)
            ),
        )
        self._program.programs[work.stage, work.rows].run(inner)

    def _select(self, op: Op, n_outputs: int) -> None:
        width = self._segment.values[op.output].width
        wanted = at(self._bindings.out_rows, (n_outputs,), np.int32)
        for i, row in enumerate(wanted.tolist()):
            source = self._address(op.inputs[0], row // CHUNK) + FLOAT_BYTES * width * (row % CHUNK)
            target = self._address(op.output, i // CHUNK) + FLOAT_BYTES * width * (i % CHUNK)
            ctypes.memmove(target, source, FLOAT_BYTES * width)

    def _rows(self, value: int, chunk: int, rows: int) -> Floats:
        return at(self._address(value, chunk), (rows, self._segment.values[value].width), np.float32)

    def _address(self, value: int, chunk: int) -> int:
        described, recipe = self._segment.values[value], self._recipe
        if value in self._bound:
            return self._bound[value] + FLOAT_BYTES * chunk * CHUNK * described.width
        before = n_chunks(recipe.n_tokens) * recipe.block_bytes["token"] if described.per == "output" else 0
        return self._base + before + chunk * recipe.block_bytes[described.per] + recipe.offsets[value]
