"""Open a draft model beside another model, within the same budget, or leave it where the budget is better spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from edgelm.engine.drafting import VOCABULARY, check_vocabulary, prepare_draft
from edgelm.engine.forward import Engine
from edgelm.engine.loading import Prepared, Request, build, open_path
from edgelm.errors import BudgetTooSmall
from edgelm.files.drafts import find
from edgelm.files.model import ModelFile
from edgelm.sizes import human

if TYPE_CHECKING:
    from edgelm.memory.plan import Plan
    from edgelm.opening import Part

AUTO = "auto"
DRAFTED, EXPECTED = 4, 3.4
"""Guesses of a round, and what it is taken to yield before a draft is known: a two-bit copy did so on open chat."""


class Draft(NamedTuple):
    """A draft model that fits: all but its weights."""

    part: Part
    prepared: Prepared

    def build(self) -> Engine:
        """Read the weights. The engine owns the session and the store from here."""
        sources, loader = self.part.sources()
        engine = build(self.prepared, *sources[:2])
        if loader is not self.part.store:
            loader.close()
        return engine


def with_draft(
    path: str,
    source: ModelFile,
    request: Request,
    open_part: Callable[[ModelFile], Part],
    planned: Callable[[Request], Prepared],
) -> tuple[Prepared, Draft | None, tuple[str, ...]]:
    """Plan a model with the draft at `path` beside it; return the plan, the draft, and sentences for the user.

    "auto" is the low-bit copy that was made of the model; without one it goes on alone, and says so.

    The draft is dropped where the budget holds only one of them, or where its memory is worth more as that of weights.
    Raises `ConfigError` if the two do not share a vocabulary.
    """
    if path == AUTO:
        found = find(source)
        if found is None:
            how = "`edgelm draft` (edgelm.draft_copy) makes one"
            return planned(request), None, (f"no draft model: there is no low-bit copy of {source.name}; {how}",)
        path = str(found)
    target = open_path(source.paths[0]) if VOCABULARY in source.metadata else source
    check_vocabulary(target, open_path(path))  # opened for this only: vocabularies are large
    del target
    file = open_path(path)
    plain = planned(request)  # first: what opening a draft leaves behind in the process must not cost the model a plan
    part = open_part(file)
    try:
        draft = Draft(part, prepare_draft(part.phase, request, source))
        prepared, reason = _beside(plain, draft.prepared.plan, request, planned)
    except BaseException:
        part.close()
        raise
    if reason:
        part.close()
        needs = human(draft.prepared.plan.planned_bytes)
        return plain, None, (f"the draft model was dropped: it would take {needs}, and {reason}",)
    told = f"draft model {file.name}: {human(draft.prepared.plan.planned_bytes)}, resident"
    return prepared, draft, (*part.told, told)


def _beside(
    plain: Prepared, draft: Plan, request: Request, planned: Callable[[Request], Prepared]
) -> tuple[Prepared, str]:
    """Return the model's plan beside the draft's, or its plan without and why that is the better one."""
    try:
        prepared = planned(replace(request, draft_bytes=draft.planned_bytes))
    except BudgetTooSmall:
        return plain, "the budget holds only one"
    if prepared.plan.streamed and not plain.plan.streamed:
        return plain, "without it all weights stay in memory"
    round_s = prepared.plan.pass_s(DRAFTED + 1) + DRAFTED * draft.pass_s(1)
    if prepared.plan.streamed and round_s > EXPECTED * plain.plan.pass_s(1) > 0:
        return plain, "so much more would be read from flash that it would slow the model down"
    return prepared, ""
