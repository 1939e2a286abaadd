"""One backend on its way through a verification: what it was asked, how it did, and how it ended if it did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from edgelm.engine.health import check
from edgelm.parity.measures import BadLogits, Comparison, Floats
from edgelm.parity.report import Figures, Parity, Status
from edgelm.parity.side import Side, SideFailed

T = TypeVar("T")


class Run:
    """A backend. Whatever happens to it is kept as a status and a sentence; nothing is raised."""

    def __init__(self, name: str, named: bool) -> None:
        """`named`: somebody asked for this one, so that its refusing is a failure."""
        self.name, self._named = name, named
        found = check(name)
        self._version = found.version
        self._status: Status = "passed"
        self._reason = ""
        self._side: Side | None = None
        self._facts: Mapping[str, Any] = {}
        self._text, self._greedy = Comparison(), list[Comparison]()
        self._operations: dict[str, float] = {}
        if not found.available:
            self._end("unavailable", found.reason)

    @property
    def side(self) -> Side | None:
        """The backend's process, as long as it answers."""
        return self._side if self._status == "passed" else None

    def open(self, stack: ExitStack, spec: Mapping[str, Any]) -> None:
        """Load the model, unless the backend does not work here."""
        if self._status == "passed":
            side = self._try(lambda: Side(do="serve", backend=self.name, **spec))
            if side is not None:
                self._side, self._facts = stack.enter_context(side), side.facts

    def read(self, ids: Sequence[int], next_ids: Sequence[int], expected: Floats, *, clear: bool) -> None:
        """Take a pass over `ids` of the text and compare every row."""
        side = self.side
        if side is not None:
            self._try(lambda: self._text.add(expected, side.forward(ids, len(ids), clear=clear), next_ids))

    def follow(self, prompt: Sequence[int], chosen: Sequence[int], expected: Floats) -> None:
        """Take the pass over `prompt`, then one for each of the `chosen` tokens that the oracle continued with."""
        side = self.side
        if side is None:
            return
        found = Comparison()

        def compare() -> None:
            found.add(expected[:1], side.forward(prompt, clear=True))
            for i, token in enumerate(chosen[:-1], 1):
                found.add(expected[i : i + 1], side.forward([token]))

        self._try(compare)
        self._greedy.append(found)

    def compute_operations(self, spec: Mapping[str, Any], ids: Sequence[int]) -> None:
        """Compute the model's operations one by one, in another process."""
        if self._status != "passed":
            return
        try:
            with Side(do="operations", backend=self.name, ids=ids, **spec) as side:
                self._operations = side.facts["errors"]
        except SideFailed as error:
            if not error.refused:  # what computes a model as a whole has no single operations to show
                self._end("failed", f"operation by operation: {error}")
            else:
                self._reason = f"its operations were not compared: {error}"

    def result(self) -> Parity:
        """Judge what was measured."""
        conversions = tuple(self._facts.get("conversions", ()))
        arithmetic = "converted" if conversions else self._facts.get("activations", "")
        text = Figures.of(self._text) if self._text.n else None
        greedy = tuple(Figures.of(found) for found in self._greedy if found.n)
        parity = Parity(
            self.name,
            self._version,
            self._status,
            self._reason,
            self._facts.get("simulated", False),
            arithmetic,
            conversions,
            self._facts.get("streamed_bytes", 0),
            text,
            greedy,
            self._operations,
        )
        return parity.judged() if self._status == "passed" else parity

    def _try(self, do: Callable[[], T]) -> T | None:
        try:
            return do()
        except SideFailed as error:
            self._end("refused" if error.refused else "failed", str(error))
        except BadLogits as error:
            self._end("failed", str(error))
        return None

    def _end(self, status: Status, reason: str) -> None:
        """Keep why nothing more is asked of this backend."""
        self._status = "failed" if self._named else status
        self._reason = f"{reason} (after {self._text.n} positions)" if self._text.n else reason
