"""The forward pass: ids in, logits out, weights from the window, keys and values in the arena.

Imports neither tokenizer nor sampler.
"""

from __future__ import annotations

import ctypes
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.backend import Bindings, CacheGroup, PassShape, Program, Session
from edgelm.engine.ir import Placed, Segment, Trace, Weight
from edgelm.engine.segments import Cut, cut
from edgelm.engine.state import Layout, Workspace
from edgelm.errors import Cancelled, ConfigError, ContextOverflow
from edgelm.files.gguf import TensorInfo
from edgelm.memory.arena import KVArena
from edgelm.memory.plan import Plan
from edgelm.memory.stores import Store
from edgelm.memory.units import Unit, part_of
from edgelm.memory.window import Window

WIDE_TOKENS = 8
"""Passes of at least this many tokens are bound by compute even where weights stream."""
MAX_SHAPES = 3
"""Compiled shapes kept: the decode pass, the prompt chunk, and the rest of a prompt."""


@dataclass(frozen=True, slots=True)
class _Address:
    """Where a weight of a run lies: `constant` ones in the window's constants, others in the run's memory."""

    constant: bool
    offset: int


@dataclass(slots=True)
class _Step:
    run: int
    program: Program
    bindings: Bindings | None  # None: weights move, so they are bound at every pass
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Engine:
    """One model, one conversation. Not thread-safe: `Model` queues its callers."""

    def __init__(
        self,
        trace: Trace,
        tensors: Mapping[str, TensorInfo],
        plan: Plan,
        window: Window,
        constants: Unit,
        arena: KVArena,
        store: Store,
        session: Session,
        n_threads: int,
        max_outputs: int = 1,
    ) -> None:
        self.plan, self.window, self.arena, self.session = plan, window, arena, session
        self._tensors, self._store, self._constants = tensors, store, constants
        self._cut: Cut = cut(trace, [run.unit for run in window.runs])
        self._layout = Layout.of(self._cut)
        self._groups = tuple(sorted(arena.windows))
        self._embedding = next(op.weights[0].tensor for op in trace.ops if op.kind == "embed")
        self.n_vocab = self._cut.values[trace.logits].width
        self.workspace = Workspace(
            self._layout,
            n_rows=plan.chunk,
            n_outputs=max_outputs,
            n_vocab=self.n_vocab,
            row_bytes=tensors[self._embedding].row_bytes,
            places={group: arena.capacities[group] for group in self._groups},
        )
        self.max_outputs, self.n_threads = max_outputs, n_threads
        # where rows of the embedding are pinned as the head: run, offset, first row, rows
        self._table = [
            (i, run.unit.offset_of(part), part.first_row, part.rows)
            for i, run in enumerate(window.runs)
            if run.pinned
            for part in run.unit.parts
            if part.tensor == self._embedding
        ]
        self._weights = [self._locate(i, placed) for i, placed in enumerate(self._cut.segments)]
        ids: dict[Segment, int] = {}  # equal segments share a program; hashing a whole model at every pass would not do
        self._segment_ids = [ids.setdefault(placed.segment, len(ids)) for placed in self._cut.segments]
        self._steps: OrderedDict[PassShape, list[_Step]] = OrderedDict()
        self._stop = threading.Event()
        self._closed = False
        session.reserve(plan.demand.scratch_bytes)

    @property
    def n_past(self) -> int:
        """Positions stored in the cache."""
        return self.arena.n_past

    def cancel(self, on: bool = True) -> None:
        """Break off the running pass (it raises `Cancelled`), from any thread; `on=False` allows passes again."""
        if on:
            self._stop.set()
        else:
            self._stop.clear()
        self.session.abort(on)

    def forward(
        self, ids: Sequence[int], n_outputs: int = 1, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Append `ids` to the cache; return the logits [n_outputs, n_vocab] of the last positions.

        Passes take up to `plan.chunk` tokens; `progress` is called with the tokens done after each. The result is
        valid until the next call. Raises `ContextOverflow`, or `Cancelled` with the passes before still stored.
        A closed engine counts as cancelled: a stream that was left half-way may still come back.
        """
        if self._closed:
            raise Cancelled("the model was closed")
        if not 1 <= n_outputs <= min(len(ids), self.max_outputs):
            raise ValueError(f"{n_outputs} rows of logits of {len(ids)} tokens; at most {self.max_outputs} are planned")
        if self.n_past + len(ids) > self.plan.context:
            raise ContextOverflow(self.n_past + len(ids), self.plan.context)
        n_known = self._tensors[self._embedding].n_rows
        if not 0 <= min(ids) <= max(ids) < n_known:
            raise ConfigError(f"token ids must be in 0…{n_known - 1}, got {min(ids)}…{max(ids)}; use its tokenizer")
        chunk, done = self.plan.chunk, 0
        while len(ids) - done > chunk:
            # the rows whose logits are wanted must share the last pass
            n_tokens = min(chunk, len(ids) - n_outputs - done)
            if len(ids) - done - n_tokens == 1 and n_tokens > 2:
                n_tokens -= 1  # kernels for one row add up in another order than those for several
            self._pass(ids[done : done + n_tokens], 1, final=False)
            done += n_tokens
            if progress is not None:
                progress(done)
        self._pass(ids[done:], n_outputs, final=True)
        if progress is not None:
            progress(len(ids))
        return self.workspace.logits(self._cut.tiles, n_outputs)

    def _pass(self, ids: Sequence[int], n_outputs: int, final: bool) -> None:
        n_tokens, arena, workspace = len(ids), self.arena, self.workspace
        groups = tuple(CacheGroup(arena.capacities[g], arena.length(g, n_tokens)) for g in self._groups)
        shape = PassShape(n_tokens, n_outputs, groups)
        steps = self._compiled(shape)
        if not final and self.window.cycle:
            steps = [step for step in steps if step.run <= self._cut.last_write]
        # kernels spin while they wait for each other, and readers need a core: a pass that waits for flash leaves one
        reading = bool(self.window.cycle) and n_tokens < WIDE_TOKENS
        self.session.use_threads(max(1, self.n_threads - 1) if reading else self.n_threads)
        self.window.begin([step.run for step in steps if step.bindings is None])
        try:
            workspace.positions[:n_tokens] = np.arange(arena.n_past, arena.n_past + n_tokens)
            workspace.out_rows[:n_outputs] = np.arange(n_tokens - n_outputs, n_tokens)
            for group, cache in zip(self._groups, groups, strict=True):
                arena.claim(
                    group, n_tokens, workspace.places[group][:n_tokens], workspace.mask(group, n_tokens, cache.length)
                )
            self._gather(ids)
            for step in steps:
                if self._stop.is_set():
                    raise Cancelled("the generation was stopped")
                address = self.window.hold(step.run)
                step.program.run(step.bindings or self._bind(step, address))
                self.window.release(step.run)
        except BaseException:
            self.window.reset()
            arena.truncate(arena.n_past)
            raise
        arena.advance(n_tokens)

    def _compiled(self, shape: PassShape) -> list[_Step]:
        steps = self._steps.get(shape)
        if steps is not None:
            self._steps.move_to_end(shape)
            return steps
        while len(self._steps) >= MAX_SHAPES:
            self._steps.popitem(last=False)
        programs: dict[int, Program] = {}
        steps = []
        for run, placed in enumerate(self._cut.segments):
            if not placed.segment.ops:
                continue
            key = self._segment_ids[run]
            if key not in programs:
                programs[key] = self.session.compile(placed.segment, shape)
            step = _Step(
                run,
                programs[key],
                None,
                tuple(self.workspace.address(value) for value in placed.inputs),
                tuple(self.workspace.output(value, self._cut.tiles, shape.n_outputs) for value in placed.outputs),
            )
            if self.window.runs[run].pinned:
                step.bindings = self._bind(step, self.window.hold(run))
            steps.append(step)
        self._steps[shape] = steps
        return steps

    def _bind(self, step: _Step, address: int) -> Bindings:
        workspace, placed, base = self.workspace, self._cut.segments[step.run], self.window.constants_address
        return Bindings(
            step.inputs,
            step.outputs,
            tuple(
                workspace.rows_address if at is None else (base if at.constant else address) + at.offset
                for at in self._weights[step.run]
            ),
            tuple(self.arena.keys[layer] for layer in placed.layers),
            tuple(self.arena.values[layer] for layer in placed.layers),
            workspace.positions_address,
            workspace.out_rows_address,
            tuple(workspace.places_addresses[group] for group in self._groups),
            tuple(workspace.mask_addresses[group] for group in self._groups),
        )

    def _locate(self, run: int, placed: Placed) -> tuple[_Address | None, ...]:
        unit = self.window.runs[run].unit
        starts = {part.tensor: (unit.offset_of(part), part.first_row) for part in unit.parts}
        constants = {part.tensor: self._constants.offset_of(part) for part in self._constants.parts}

        def find(weight: Weight) -> _Address | None:
            info = self._tensors[weight.tensor]
            if weight.tensor in constants:
                return _Address(True, constants[weight.tensor] + weight.first_row * info.row_bytes // info.shape[0])
            at, first = starts[weight.tensor]
            return _Address(False, at + (weight.first_row - first) * info.row_bytes)

        located: list[_Address | None] = []
        weights = iter(placed.weights)
        for op in placed.segment.ops:  # the rows of the embedding are gathered apart
            located.extend(
                None if op.kind == "embed" else find(weight) for weight in (next(weights) for _ in op.weights)
            )
        return tuple(located)

    def _gather(self, ids: Sequence[int]) -> None:
        """Fetch the embedding rows of `ids`: from pinned weights where the head shares them, else from flash."""
        info, workspace = self._tensors[self._embedding], self.workspace
        done: dict[int, int] = {}
        for i, token in enumerate(ids):
            target = workspace.rows_address + i * info.row_bytes
            source = done.get(token) or self._resident_row(token, info) or self._read_row(token, info)
            ctypes.memmove(target, source, info.row_bytes)
            done[token] = target

    def _resident_row(self, token: int, info: TensorInfo) -> int | None:
        for run, offset, first, rows in self._table:
            if first <= token < first + rows:
                return self.window.hold(run) + offset + (token - first) * info.row_bytes
        return None

    def _read_row(self, token: int, info: TensorInfo) -> int:
        row = part_of(info, token, 1)
        buffer = self.workspace.row_buffer
        return buffer.address + self._store.read_into(row.file, row.offset, row.n_bytes, buffer.view, 0)

    def close(self) -> None:
        """Give all memory back and stop the threads. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._steps.clear()
        self.window.close()
        self.arena.close()
        self.workspace.close()
        self.session.close()
        self._store.close()
