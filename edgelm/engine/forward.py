"""The forward pass: ids in, logits out, weights from the window, keys and values in the arena.

Imports neither tokenizer nor sampler.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.adopting import AdoptedWeights
from edgelm.engine.backend import Adopting, Bindings, CacheGroup, PassShape, Program, Session
from edgelm.engine.demand import Model, most_shapes
from edgelm.engine.gather import Gather
from edgelm.engine.ir import AttendSpec, Segment, Weight
from edgelm.engine.located import Address, Located, computed_on
from edgelm.engine.pace import Pace
from edgelm.engine.passes import check_request, first_width
from edgelm.engine.rows import Rows
from edgelm.engine.segments import Cut, cut
from edgelm.engine.state import Layout, Workspace
from edgelm.errors import Cancelled
from edgelm.memory.arena import KVArena, capacity
from edgelm.memory.claims import Claim, Guesses, SideBySide
from edgelm.memory.pinned import PinnedWeights
from edgelm.memory.plan import Plan
from edgelm.memory.spill_shape import Traffic
from edgelm.memory.stores import Store
from edgelm.memory.timeline import Times
from edgelm.memory.units import Part
from edgelm.memory.window import N_READERS, Window

FLASH_BOUND = 3.0
"""How much longer than computing reading must take for a pass to be one that only waits for flash."""


if TYPE_CHECKING:
    from edgelm.engine.spilled import Spilled
    from edgelm.memory.flash import ReadPattern


@dataclass(slots=True)
class _Step:
    segment: int
    run: int
    program: Program
    bindings: Bindings | None  # None: weights move, so they are bound at every pass
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    last: bool = True  # of its run, of those whose weights move


class Engine:
    """One model, one conversation. Not thread-safe: `Model` queues its callers."""

    def __init__(
        self,
        model: Model,
        plan: Plan,
        pinned: PinnedWeights,
        arena: KVArena,
        store: Store,
        session: Session,
        n_threads: int,
        max_outputs: int = 1,
        pattern: ReadPattern | None = None,
        *,
        times: Times | None = None,
        spilled: Spilled | None = None,
        apart: Collection[int] = (),
    ) -> None:
        """`load` must be called before the first pass. `times`: where to count, if not apart.

        `spilled`: the layers whose keys and values may lie on flash, if there are any. `apart`: layers whose attention
        is a segment of its own.
        """
        self._apart = spilled.layers if spilled else frozenset(apart)
        self.arena, self.session, self.max_outputs = arena, session, max_outputs
        self._model, self._tensors, self._pinned, self.store = model, model.tensors, pinned, store
        self.n_threads, self.spilled = n_threads, spilled
        self._groups = tuple(sorted(arena.windows))
        self._embedding = model.embedding
        self.n_vocab = model.n_vocab
        self._adopted = AdoptedWeights(session) if isinstance(session, Adopting) else None
        self._located = Located(model.tensors, pinned, self._adopted)
        self._weights: list[tuple[Address | None, ...]] = []  # of each segment; known once weights are loaded
        self._steps: OrderedDict[PassShape, list[_Step]] = OrderedDict()
        self._stop = threading.Event()
        self._closed = False
        self._n_tried = 0  # rows of a verified pass that nobody has kept yet
        self.times = times or Times()
        self.pattern = pattern
        self.plan, self.window = plan, self._open_window(plan)
        self._prepare(plan)

    def load(
        self,
        loader: Store | None = None,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Read what the plan pins, through `loader` (the engine's own store by default), and begin to stream."""
        parts = [part for i in sorted(self.plan.pinned) for part in self.plan.units[i].parts]
        constants, store = self._model.constants.parts, loader or self.store
        if self._adopted is None:
            self._pinned.keep([*constants, *parts], store, N_READERS, progress, cancelled)
        else:
            vectors, matrices = self._to_adopt()
            self._adopted.keep(vectors, matrices, constants, self._pinned, store, N_READERS, progress, cancelled)
        runs = (self.window.runs[i] for i in self._cut.runs)
        self._weights = [self._located(*pair) for pair in zip(runs, self._cut.segments, strict=True)]
        self.window.start()

    def _to_adopt(self) -> tuple[dict[Weight, int], dict[Weight, Part]]:
        """Return the vectors of the model with their addresses, and the matrices that stay with their parts."""
        vectors: dict[Weight, int] = {}
        matrices: dict[Weight, Part] = {}
        for i, placed in zip(self._cut.runs, self._cut.segments, strict=True):
            run = self.window.runs[i]
            parts = {(part.tensor, part.first_row): part for part in run.unit.parts}
            for weight in computed_on(placed):
                if self._tensors[weight.tensor].n_rows == 1:
                    vectors[weight] = self._located.vector(weight)
                elif run.pinned:
                    matrices[weight] = parts[weight.tensor, weight.first_row]
        return vectors, matrices

    def carry_out(self, plan: Plan) -> None:
        """Go over to another plan between two passes. What it does not pin is given back first; the cache stays."""
        before = self.window
        before.close()
        self._steps.clear()  # programs hold on to scratch memory and addresses
        self.workspace.close()
        self.plan, self.window = plan, self._open_window(plan)
        self.window.bytes_streamed = before.bytes_streamed
        try:
            self._prepare(plan)
            self.load()
        except BaseException:
            self.close()  # weights are missing: a closed model says so, a half one would compute with them
            raise

    def _open_window(self, plan: Plan) -> Window:
        """Return a window that reads in the blocks that the flash likes.

        Where flash is by far the slower, every free slot is being read; else more readers would only disturb computing.
        """
        if self.pattern is None or plan.rates is None or not plan.streamed:
            return Window(self.store, plan, self.times)
        read_s = plan.streamed_bytes / plan.rates.flash_bytes_per_s
        n_readers = plan.n_slots if read_s > FLASH_BOUND * plan.rates.compute_s(plan.pass_bytes) else N_READERS
        return Window(self.store, plan, self.times, block_bytes=self.pattern.block_bytes, n_readers=n_readers)

    def _prepare(self, plan: Plan) -> None:
        """Cut the model at the edges of the plan's runs and lay out what passes between the segments."""
        trace, arena = self._model.trace, self.arena
        self._pace = Pace(self.n_threads, bool(self.window.cycle or self.spilled))
        self._cut: Cut = cut(trace, [run.unit for run in self.window.runs], self._apart)
        self._layout = Layout.of(self._cut)
        self.workspace = Workspace(
            self._layout,
            n_rows=plan.chunk,
            n_outputs=self.max_rows,
            n_vocab=self.n_vocab,
            row_bytes=self._embedding.row_bytes,
            places={g: capacity(arena.windows[g], plan.context, arena.chunk, arena.layout) for g in self._groups},
        )
        resident = [
            (part.first_row, part.first_row + part.rows)
            for run in self.window.runs
            if run.pinned and self._adopted is None
            for part in run.unit.parts
            if (part.tensor, part.file) == (self._embedding.name, self._embedding.file)
        ]
        self._gather = Gather(self._embedding, self.workspace, self.store, self._pinned, resident)
        ids: dict[Segment, int] = {}  # equal segments share a program; hashing a whole model at every pass would not do
        self._segment_ids = [ids.setdefault(placed.segment, len(ids)) for placed in self._cut.segments]
        self.session.reserve(plan.demand.scratch_bytes)

    @property
    def trees(self) -> bool:
        """Whether drafted rows may branch: where keys and values spill, they form a chain."""
        return self.spilled is None

    @property
    def max_rows(self) -> int:
        """Rows of logits that one pass can return."""
        return self.plan.demand.n_rows

    @property
    def n_past(self) -> int:
        """Positions stored in the cache."""
        return self.arena.n_past

    @property
    def bytes_streamed(self) -> int:
        """Bytes of weights read from flash so far, those that were loaded for good not counted."""
        return self.window.bytes_streamed

    @property
    def kv_traffic(self) -> Traffic:
        """Bytes of keys and values written to flash and read back so far."""
        return self.spilled.cache.traffic if self.spilled else Traffic()

    def truncate(self, n_past: int) -> int:
        """Forget positions from `n_past` on; return how many are kept, see `KVArena.truncate`."""
        self._n_tried = 0
        return self.arena.truncate(n_past)

    def cancel(self, on: bool = True) -> None:
        """Break off the running pass (it raises `Cancelled`), from any thread; `on=False` allows passes again."""
        if on:
            self._stop.set()
        else:
            self._stop.clear()
        self.session.abort(on)
        if self.spilled is not None:
            self.spilled.abort(on)

    def forward(
        self, ids: Sequence[int], n_outputs: int = 1, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Append `ids` to the cache; return the logits [n_outputs, n_vocab] of the last positions.

        Passes take up to `plan.chunk` tokens; `progress` is called with the tokens done between them, and may change
        the plan. The result is valid until the next call. Raises `ContextOverflow`, or `Cancelled` with the passes
        before still stored. A closed engine counts as cancelled: a stream that was left half-way may still come back.
        """
        self.check(ids, n_outputs)
        self.arena.grow(len(ids))  # once, not with every pass
        done = 0
        while (n_tokens := first_width(len(ids), done, self.plan.chunk, n_outputs)) < len(ids) - done:
            self._pass(ids[done : done + n_tokens], 1, final=False)
            done += n_tokens
            if progress is not None:
                progress(done)
        self._pass(ids[done:], n_outputs, final=True)
        return self.workspace.logits(self._cut.tiles, n_outputs)

    def verify(self, ids: Sequence[int], parents: Sequence[int]) -> Rows:
        """Compute a pass over a tree of drafted ids without storing them; return the logits of every row.

        `parents[i]` is the row before row i, -1 the last stored position. Raises as `forward` does.
        """
        self.check(ids, len(ids), self.max_rows)
        self._pass(ids, len(ids), final=True, claim=Guesses(parents))
        self._n_tried = len(ids)
        return Rows(self.workspace.tiles(self._cut.tiles, len(ids)))

    def extend(self, ids: Sequence[int], claim: SideBySide, answers: Sequence[int]) -> Rows:
        """Append one id to each of these answers, which stand side by side; return the logits of every row.

        Raises as `forward` does. `truncate` to the prompt ends all of them.
        """
        self.check(ids, len(ids), self.max_rows)
        claim.take(answers)
        self._pass(ids, len(ids), final=True, claim=claim)
        self.arena.advance(len(ids))
        claim.passed()
        return Rows(self.workspace.tiles(self._cut.tiles, len(ids)))

    def keep(self, rows: Sequence[int]) -> None:
        """Store rows of the last verified pass that lie on one path from its root, in order."""
        self.arena.keep(rows, self._n_tried)
        self._n_tried = 0

    def leave_core(self, on: bool) -> None:
        """Compute narrow passes on one thread fewer while the weights of another model are read beside this one."""
        self._pace = Pace(self.n_threads, on, tries=False)

    def check(self, ids: Sequence[int], n_outputs: int, most: int | None = None) -> None:
        """Raise what `forward` raises before it computes anything."""
        if self._closed:
            raise Cancelled("the model was closed")
        check_request(self, ids, n_outputs, most or self.max_outputs, self._embedding.n_rows)
        if self._n_tried:  # nobody kept them
            self.keep(())

    def _pass(self, ids: Sequence[int], n_outputs: int, final: bool, claim: Claim | None = None) -> None:
        n_tokens, arena, workspace = len(ids), self.arena, self.workspace
        arena.grow(n_tokens)
        groups = tuple(CacheGroup(arena.capacities[g], arena.length(g, n_tokens)) for g in self._groups)
        verified = claim is not None and bool(groups)  # without a cache there are no passes of one to be equal to
        tree = claim is not None and claim.branches
        shape = PassShape(n_tokens, n_outputs, groups, tree, arena.layout, verified)
        steps = self._compiled(shape)
        if not final and self.window.cycle:
            steps = [step for step in steps if step.run <= self._cut.last_write]
        self.session.use_threads(self._pace.threads(n_tokens))
        began_s = time.perf_counter()
        self.window.begin([step.run for step in steps if step.bindings is None and step.last])
        try:
            if self.spilled is not None:
                self.spilled.begin(arena.n_past, n_tokens)
            positions = claim.positions(arena.n_past) if claim else arena.n_past + np.arange(n_tokens)
            workspace.positions[:n_tokens] = positions
            workspace.out_rows[:n_outputs] = np.arange(n_tokens - n_outputs, n_tokens)
            for group, cache in zip(self._groups, groups, strict=True):
                places, mask = workspace.places[group][:n_tokens], workspace.mask(group, n_tokens, cache.length)
                if claim is not None:
                    claim.place(arena, group, places, mask)
                else:
                    arena.claim(group, n_tokens, places, mask)
            self._gather(ids)
            for step in steps:
                if self._stop.is_set():
                    raise Cancelled("the generation was stopped")
                bindings = step.bindings or self._bind(step, self.window.hold(step.run))
                began = time.perf_counter()
                step.program.run(bindings)
                self.times.add("compute", step.run, began)
                if step.bindings is None and step.last:
                    self.window.release(step.run)
        except BaseException:
            self.window.reset()
            if self.spilled is not None:
                self.spilled.cache.reset()
            arena.truncate(arena.n_past)
            raise
        if claim is None:
            arena.advance(n_tokens)
        self._pace.passed(n_tokens, time.perf_counter() - began_s)

    def _compiled(self, shape: PassShape) -> list[_Step]:
        steps = self._steps.get(shape)
        if steps is not None:
            self._steps.move_to_end(shape)
            return steps
        while len(self._steps) >= most_shapes(self.max_rows):
            self._steps.popitem(last=False)
        programs: dict[int, Program] = {}
        steps = []
        last: dict[int, _Step] = {}
        for i, (run, placed) in enumerate(zip(self._cut.runs, self._cut.segments, strict=True)):
            if not placed.segment.ops:
                continue
            key, spec = self._segment_ids[i], placed.segment.ops[0].params
            if self.spilled and isinstance(spec, AttendSpec) and placed.layers[0] in self.spilled.layers:
                program = self.spilled.program(placed.layers[0], spec, shape.n_tokens)
            else:
                program = programs[key] = programs.get(key) or self.session.compile(placed.segment, shape)
            step = _Step(
                i,
                run,
                program,
                None,
                tuple(self.workspace.address(value) for value in placed.inputs),
                tuple(self.workspace.output(value, self._cut.tiles, shape.n_outputs) for value in placed.outputs),
            )
            if self.window.runs[run].pinned or not placed.weights:
                step.bindings = self._bind(step, 0)
            else:
                if run in last:
                    last[run].last = False
                last[run] = step
            steps.append(step)
        self._steps[shape] = steps
        return steps

    def _bind(self, step: _Step, address: int) -> Bindings:
        """Bind a step whose weights stay, or are held at `address`."""
        workspace, placed = self.workspace, self._cut.segments[step.segment]
        return Bindings(
            step.inputs,
            step.outputs,
            tuple(
                workspace.rows_address if at is None else at.at if at.fixed else address + at.at
                for at in self._weights[step.segment]
            ),
            tuple(self.arena.keys[layer] for layer in placed.layers),
            tuple(self.arena.values[layer] for layer in placed.layers),
            workspace.positions_address,
            workspace.out_rows_address,
            tuple(workspace.places_addresses[group] for group in self._groups),
            tuple(workspace.mask_addresses[group] for group in self._groups),
        )

    def close(self) -> None:
        """Give all memory back and stop the threads. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._steps.clear()
        self.window.close()
        if self._adopted is not None:
            self._adopted.close()
        self._pinned.close()
        self.arena.close()
        if self.spilled is not None:
            self.spilled.close()
        self.workspace.close()
        self.session.close()
        self.store.close()
