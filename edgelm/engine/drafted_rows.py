"""How many rows of logits a pass is planned to return: more of them let it yield more tokens, but take memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgelm.engine.demand import CHUNKS
from edgelm.engine.state import FLOAT_BYTES
from edgelm.errors import BudgetTooSmall, ConfigError

if TYPE_CHECKING:
    from edgelm.engine.loading import Request
    from edgelm.memory.plan import Plan

ROWS, RESIDENT_ROWS = (32, 16, 8, 4), 16
"""Rows of drafts that a pass may verify. Where all weights stay, wider passes cost more than they bring."""
ROWS_SHARE = 0.05
"""Share of the weights' memory that the logits of drafts may take."""
ROWS_OF_STREAMED = 0.015
"""How much more may be read from flash in each pass for them."""
OF_MODEL = 2.0
"""How much more memory the rows are worth where a draft model guesses: it is right more often."""


def most_rows(plan_with: Callable[[int], Plan | None], request: Request, n_vocab: int, context: int) -> Plan:
    """Return the plan with as many rows for drafts as are worth their memory, and no fewer than the request asks for.

    `plan_with` plans with so many rows: it returns None where no pass is so wide, and raises `BudgetTooSmall`, which
    this raises for as few as the request allows.
    """

    def planned(n_rows: int) -> Plan | None:
        try:
            return plan_with(n_rows)
        except BudgetTooSmall:
            return None

    if request.speculate:
        roomy = planned(max(RESIDENT_ROWS, request.parallel))
        if roomy is not None and not _streams(roomy) and (roomy.prompts or roomy).chunk >= min(CHUNKS[0], context):
            return roomy
    plain = plan_with(request.parallel)
    if plain is None:
        raise ConfigError("so many rows of logits need a pass that is as wide; ask for a longer context, or for fewer")
    if not request.speculate:
        return plain
    room = max(ROWS_SHARE * (plain.pinned_bytes + plain.slots_bytes), ROWS_OF_STREAMED * plain.streamed_bytes)
    room *= OF_MODEL if request.draft_bytes else 1.0
    for n_rows in ROWS:
        if n_rows <= request.parallel or n_rows * n_vocab * FLOAT_BYTES > room:
            continue
        plan = planned(n_rows)
        if plan is not None and _streams(plan) == _streams(plain):
            return plan
    return plain


def _streams(plan: Plan) -> bool:
    return bool(plan.streamed or (plan.prompts and plan.prompts.streamed))
