"""Attention that is cheaper than the model's own, and what it cannot be combined with. Exact is the default."""

from __future__ import annotations

from edgelm.engine.wishes import Wishes
from edgelm.errors import ConfigError

KINDS = ("exact", "important", "filtered")
"""`important`: see `edgelm.engine.important`; `filtered`: see `edgelm.engine.filtering`."""
KEPT = 0.25
"""Share of the context that is kept of a longer prompt, unless another one is asked for."""


def kept_share(wishes: Wishes) -> float | None:
    """Return the share of the context that the cache keeps of prompts; None: all of it, exactly.

    Raises `ConfigError` for values and combinations that cannot work.
    """
    if wishes.attention not in KINDS:
        raise ConfigError(f"unknown attention {wishes.attention!r} (known: {', '.join(KINDS)})")
    if wishes.attention == "exact":
        if wishes.kept is not None:
            raise ConfigError("exact attention keeps everything; leave kept out, or ask for another attention")
        return None
    kept = KEPT if wishes.kept is None else wishes.kept
    if not 0 < kept <= 1:
        raise ConfigError(f"kept must be a share of the context above 0 and at most 1, got {kept:g}")
    if "+" in wishes.backend:
        raise ConfigError("approximate attention works on one backend; name one of the two, or leave it out")
    if wishes.draft is not None:
        raise ConfigError("a draft model reads whole prompts; leave it out, or the approximate attention")
    if wishes.parallel > 1:
        raise ConfigError("approximate attention gives one answer at a time; leave it out, or ask for one answer")
    if wishes.attention == "important" and not wishes.spill:
        raise ConfigError(
            "important attention puts on flash what has no room while a prompt is read; allow that, or use 'filtered'"
        )
    return kept if kept < 1 else None


def guesses(wishes: Wishes) -> bool:
    """Say whether tokens are guessed and verified: not in a bounded cache, whose places depend on how tokens come."""
    return wishes.speculate and (wishes.attention != "important" or kept_share(wishes) is None)
