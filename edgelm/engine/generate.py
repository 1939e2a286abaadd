"""From ids to ids: prefill, sample, append, until something ends it. Knows no text.

The innermost of the nested generators; `edgelm.model` puts text and statistics around it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgelm.engine.filtered import FilteredEngine
from edgelm.engine.important import ImportantEngine
from edgelm.engine.largest import largest
from edgelm.engine.rows import Rows
from edgelm.engine.running import Running
from edgelm.engine.sampling import Logits, Sampler
from edgelm.engine.speculation.drafts import NOTHING, ROOT
from edgelm.engine.speculation.speculator import Counts, Speculator
from edgelm.errors import ConfigError, ContextOverflow
from edgelm.sequences import n_common

if TYPE_CHECKING:
    from edgelm.memory.arena import KVArena

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


class Conversation:
    """An engine and the ids whose keys and values it holds, so that a prompt only computes what is new."""

    def __init__(self, engine: Running) -> None:
        self.engine = engine
        self.counts = Counts()
        self._stored: list[int] = []
        self._tried: tuple[int, ...] = ()

    def prefill(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> int:
        """Append what is not stored yet of `ids`; return how many tokens were computed.

        `progress` is called between passes, with the tokens done. Logits of the last id are then in `logits`. Raises
        `ContextOverflow` before anything is computed.
        """
        context = self.engine.plan.context
        if len(ids) >= context:
            raise ContextOverflow(len(ids), context)
        if isinstance(self.engine, FilteredEngine) and len(ids) > self.engine.filtering.n_kept:
            return self._prefill_filtered(self.engine, ids, progress)
        kept = self.engine.truncate(n_common(self._stored, ids[:-1]))  # the last one is computed for its logits
        del self._stored[kept:]
        self._forward(ids[kept:], progress)
        if isinstance(self.engine, ImportantEngine):
            self.engine.compress()
        return len(ids) - kept

    def _prefill_filtered(
        self, engine: FilteredEngine, ids: Sequence[int], progress: Callable[[int], None] | None
    ) -> int:
        """Read all of a prompt, and store what matters of it. What was stored before is gone."""
        self._stored.clear()
        self._forward([ids[i] for i in engine.look(ids, progress)], progress)
        return len(ids)

    def step(self, token: int) -> None:
        """Append one token."""
        self._forward([token])

    def verify(self, ids: Sequence[int], parents: Sequence[int]) -> Rows:
        """Compute the logits after each id of a tree, see `Running.verify`; what is right is to be kept."""
        try:
            rows = self.engine.verify(ids, parents)
        finally:
            del self._stored[self.engine.n_past :]
        self._tried = tuple(ids)
        return rows

    def keep(self, rows: Sequence[int]) -> None:
        """Append the ids of these rows of the last verified pass."""
        self.engine.keep(rows)
        self._stored.extend(self._tried[row] for row in rows)

    def forget_after(self, n: int) -> None:
        """Keep the first `n` tokens of what is stored, at the most."""
        kept = self.engine.truncate(n)
        del self._stored[kept:]

    def stores(self, ids: Sequence[int]) -> bool:
        """Say whether the cache begins with these ids."""
        return self._stored[: len(ids)] == list(ids)

    @property
    def stored(self) -> tuple[int, ...]:
        """The ids whose keys and values are in the cache."""
        return tuple(self._stored)

    def save(self, path: Path, identity: str) -> int:
        """Write what is stored to a file; return its bytes. Raises `ConfigError` where a cache cannot be saved."""
        from edgelm.memory import saved

        return saved.save(path, self._arena(), self._stored, identity)

    def restore(self, path: Path, identity: str) -> tuple[int, ...]:
        """Store what is in a file, instead of what was; return its ids. Nothing is stored after a `DamagedCache`."""
        from edgelm.memory import saved

        self._stored.clear()
        self.engine.truncate(0)
        self._stored.extend(saved.load(path, self._arena(), identity))
        return self.stored

    @property
    def not_to_be_saved(self) -> str:
        """Why what is stored cannot be saved; empty if it can."""
        if self.engine.plan.approximate:
            return "what an approximate attention keeps is not the whole conversation"
        if getattr(self.engine, "arena", None) is None or getattr(self.engine, "spilled", None) is not None:
            return (
                "keys and values can be saved where edgelm keeps all of them in memory: not those of ONNX graphs, nor "
                "with a part on flash"
            )
        return ""

    @property
    def kept_as(self) -> tuple[str, str]:
        """The types of keys and values in the cache. Raises `ConfigError` where a cache cannot be saved."""
        return self._arena().layout.items

    def _arena(self) -> KVArena:
        if reason := self.not_to_be_saved:
            raise ConfigError(reason)
        arena: KVArena = getattr(self.engine, "arena")  # noqa: B009
        return arena

    @property
    def is_full(self) -> bool:
        """Whether no further token can be appended."""
        return self.engine.n_past >= self.engine.plan.places

    def _forward(self, ids: Sequence[int], progress: Callable[[int], None] | None = None) -> None:
        done = len(self._stored)
        try:
            self.logits = self.engine.forward(ids, progress=progress)[-1]
        finally:
            # a pass that was broken off may have cost older positions of a sliding window: then nothing is kept
            stored = self.engine.n_past
            self._stored.extend(ids[: max(stored - done, 0)])
            del self._stored[stored:]


def token_ids(
    conversation: Conversation,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_tokens: int,
    ends: Collection[int] = (),
    speculator: Speculator | None = None,
) -> Generator[int, None, FinishReason]:
    """Yield the ids that follow the prefilled `prompt`; return why it ended. An id of `ends` is not yielded.

    With a `speculator` a pass may yield several. Every id is drawn by the sampler from the logits that belong to it,
    whatever was guessed: the law is that of plain sampling, and a seeded sampler draws the same numbers for it.
    """
    history = list(prompt)
    engine, count = conversation.engine, 0
    new = [_drawn(conversation, sampler, conversation.logits, history, len(prompt))]
    if speculator is not None and max_tokens > 1:
        speculator.begin(history)
    while True:
        for token in new:
            if token in ends:
                return "stop"
            count += 1
            yield token
        if count >= max_tokens or conversation.is_full:
            return "length"
        most = min(max_tokens - count, engine.plan.places - engine.n_past)
        new = _round(conversation, sampler, history, len(prompt), ends, most, speculator)


def _round(
    conversation: Conversation,
    sampler: Sampler,
    history: list[int],
    n_prompt: int,
    ends: Collection[int],
    most: int,
    speculator: Speculator | None,
) -> list[int]:
    """Compute a pass for the newest token and what is guessed to follow it; return up to `most` ids that do.

    They are appended to `history`. Lossless for trees, too: a guess counts if it is what the sampler drew.
    """
    newest, n_before = history[-1], len(history)
    draft = NOTHING
    if speculator is not None:
        forced = getattr(sampler, "forced", None)
        draft = speculator.draft(history, most, forced(history) if forced else ())
    ids = (newest, *draft.ids)
    began_s = time.perf_counter()
    if draft.ids:
        rows: Rows | tuple[Logits] = conversation.verify(ids, (ROOT, *(parent + 1 for parent in draft.parents)))
    else:
        conversation.step(newest)
        rows = (conversation.logits,)
    if speculator is not None and (k := speculator.successors):
        for row, token in enumerate(ids):  # first: samplers write to the logits
            speculator.recycle(token, largest(rows[row], k))
    path: list[int] = []
    node = ROOT
    while True:
        token = _drawn(conversation, sampler, rows[node + 1], history, n_prompt)
        found = [child for child in draft.children(node) if draft.ids[child] == token]
        if not found or token in ends:
            break
        node = found[0]
        path.append(node)
    if draft.ids:
        conversation.keep([0, *(node + 1 for node in path)])
    conversation.counts.passes += 1
    conversation.counts.drafted += len(draft.ids)
    conversation.counts.accepted += len(path)
    if speculator is not None:
        speculator.learn(draft, path, history[n_before:], time.perf_counter() - began_s)
    return history[n_before:]


def _drawn(conversation: Conversation, sampler: Sampler, logits: Logits, history: list[int], n_prompt: int) -> int:
    """Draw the next id and append it to `history`."""
    began = time.perf_counter()
    token = sampler(logits, history)
    history.append(token)
    conversation.engine.times.add("sample", len(history) - n_prompt, began)
    return token
