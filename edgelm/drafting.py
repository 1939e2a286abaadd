"""Open a draft model beside another model, within the same budget, or leave it where the budget is better spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from edgelm.engine.drafting import check_vocabulary, prepare_draft
from edgelm.engine.forward import Engine
from edgelm.engine.loading import Prepared, Request, build, open_path
from edgelm.errors import BudgetTooSmall
from edgelm.files.model import ModelFile
from edgelm.sizes import human

if TYPE_CHECKING:
    from edgelm.opening import Part


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

    The draft is dropped where the budget holds only one of them, or where the model would have to stream because of it.
    Raises `ConfigError` if the two do not share a vocabulary.
    """
    file = open_path(path)
    check_vocabulary(source, file)
    part = open_part(file)
    try:
        draft = Draft(part, prepare_draft(part.phase, request, source))
        needs = f"it would take {human(draft.prepared.plan.planned_bytes)}"
        try:
            prepared = planned(replace(request, draft_bytes=draft.prepared.plan.planned_bytes))
        except BudgetTooSmall:
            part.close()
            return planned(request), None, (f"the draft model was dropped: {needs}, and the budget holds only one",)
        if prepared.plan.streamed and not (plain := planned(request)).plan.streamed:
            part.close()
            return plain, None, (f"the draft model was dropped: {needs}, and without it all weights stay in memory",)
    except BaseException:
        part.close()
        raise
    told = f"draft model {file.name}: {human(draft.prepared.plan.planned_bytes)}, resident"
    return prepared, draft, (*part.told, told)
