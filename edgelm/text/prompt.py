"""A rendered prompt: what is shown, and which of its characters may take part in special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Prompt(NamedTuple):
    """The text of a prompt in which only the template's own words count as special tokens.

    `guarded` is the text with some characters of the messages replaced by noncharacters, so that nothing in the
    messages reads like a special token; `originals` maps each of those noncharacters (its code point) back.
    """

    guarded: str
    originals: Mapping[int, str] = MappingProxyType({})
    notice: str | None = None
    """What the user should know of how the messages were changed to fit the template."""

    @property
    def text(self) -> str:
        """The prompt as the model is meant to read it."""
        return self.restore(self.guarded)

    def restore(self, guarded: str) -> str:
        """Return a part of `guarded` with the characters of the messages put back."""
        return guarded.translate(self.originals) if self.originals else guarded
