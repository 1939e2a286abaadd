"""What a verification found, as values and as Markdown; and how close is close enough."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from edgelm.parity.measures import Comparison

Status = Literal["passed", "outside", "failed", "refused", "unavailable"]


class Tolerance(NamedTuple):
    """The largest mean KL divergence (nats), and the smallest share of positions with the oracle's token on top."""

    mean_kl: float
    agreement: float


TOLERANCES: Mapping[str, Tolerance] = {
    "f32": Tolerance(1e-4, 0.99),
    "int8": Tolerance(5e-3, 0.95),
    "converted": Tolerance(5e-2, 0.80),
}
"""By arithmetic: float throughout, 8-bit activations, or weights that were converted with a loss."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A backend's logits beside the oracle's.

    `largest_gap`: where the two chose differently, how much either preferred its own choice, at most. `first_mismatch`
    counts from 0; None if there is none. `perplexity` is None where the tokens that follow are not known.
    """

    positions: int
    mean_kl: float
    largest_kl: float
    agreement: float
    largest_gap: float
    largest_difference: float
    first_mismatch: int | None
    perplexity: float | None

    @classmethod
    def of(cls, found: Comparison) -> Figures:
        return cls(
            found.n,
            found.mean_kl,
            found.largest_kl,
            found.agreement,
            found.largest_gap,
            found.largest_difference,
            found.first_mismatch,
            found.likelihood.perplexity,
        )


@dataclass(frozen=True, slots=True)
class Parity:
    """One backend. `text`: passes of many tokens; `greedy`: single tokens, one continuation each, on the oracle's ids.

    `operations`: the largest NMSE of each kind of operation on the oracle's own inputs. `reason` is a sentence on
    anything but success, `conversions` are the losses of weights that the backend states itself. A `simulated` one
    computes for a device that is not there.
    """

    backend: str
    version: str
    status: Status
    reason: str
    simulated: bool
    arithmetic: str
    conversions: tuple[str, ...]
    streamed_bytes: int
    text: Figures | None
    greedy: tuple[Figures, ...]
    operations: Mapping[str, float]

    @property
    def greedy_kl(self) -> float:
        """Mean KL over all continuations."""
        n = sum(figures.positions for figures in self.greedy)
        return sum(figures.mean_kl * figures.positions for figures in self.greedy) / max(n, 1)

    def judged(self) -> Parity:
        """Return this as passed, or as outside with what lies outside the tolerance."""
        assert self.text is not None
        tolerance = TOLERANCES[self.arithmetic]
        wrong = []
        for what, mean_kl in (("mean KL", self.text.mean_kl), ("mean KL of single tokens", self.greedy_kl)):
            if not mean_kl <= tolerance.mean_kl:
                wrong.append(f"{what} is {mean_kl:.3g}, above {tolerance.mean_kl:g}")
        if not self.text.agreement >= tolerance.agreement:
            wrong.append(f"top-1 agreement is {self.text.agreement:.2%}, below {tolerance.agreement:.0%}")
        if not wrong:
            return self
        return replace(self, status="outside", reason="; ".join(wrong))


@dataclass(frozen=True, slots=True)
class Verification:
    """What `edgelm.verify` found. `oracle` is the backend that the others were compared with."""

    model: str
    text: str
    oracle: str
    oracle_perplexity: float | None
    positions: int
    context: int
    threads: int
    budget_bytes: int | None
    seconds: float
    backends: tuple[Parity, ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing lies outside its tolerance or failed."""
        statuses = {parity.status for parity in self.backends}
        return "passed" in statuses and not statuses & {"outside", "failed"}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; sizes end in `_bytes`, divergences are in nats."""
        tolerances = {name: tolerance._asdict() for name, tolerance in TOLERANCES.items()}
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)), parse_constant=lambda name: None)
        return {**found, "passed": self.passed, "tolerances": tolerances}

    def markdown(self) -> str:
        """Return tables for people."""
        budget = f"{self.budget_bytes:,} bytes" if self.budget_bytes else "what the device can spare"
        parts = [
            f"# {self.model}: backends beside the oracle ({self.oracle})",
            f"{self.positions} positions of {self.text}, context {self.context}; each process: budget {budget}, "
            f"{self.threads} threads. {self.seconds:.0f} s.",
            _table(_HEADER, [_row(parity) for parity in self.backends] or [("none", *[""] * (len(_HEADER) - 1))]),
        ]
        if self.oracle_perplexity is not None:
            parts.append(f"Perplexity to the oracle: {self.oracle_perplexity:.4f}.")
        lost = [f"- {parity.backend} converts: {said}" for parity in self.backends for said in parity.conversions]
        reasons = [f"- {parity.backend}: {parity.reason}" for parity in self.backends if parity.reason]
        parts += ["\n".join((*reasons, *lost))] if reasons or lost else []
        measured = [parity for parity in self.backends if parity.operations]
        if measured:
            kinds = dict.fromkeys(kind for parity in measured for kind in parity.operations)
            header = ("operation, largest NMSE", *(parity.backend for parity in measured))
            rows = [(kind, *(_number(parity.operations.get(kind)) for parity in measured)) for kind in kinds]
            parts.append(_table(header, rows))
        return "\n\n".join(parts)


_HEADER = (
    "backend", "result", "arithmetic", "mean KL", "largest KL", "top-1", "largest gap", "perplexity",
    "KL of single tokens", "greedy",
)  # fmt: skip


def _row(parity: Parity) -> tuple[str, ...]:
    result = parity.status if parity.status == "passed" else f"**{parity.status}**"
    figures = parity.text
    if figures is None:
        return (f"{parity.backend}", result, parity.arithmetic, *[""] * (len(_HEADER) - 3))
    tolerance = TOLERANCES[parity.arithmetic]
    label = ", simulated" if parity.simulated and "simulated" not in parity.version else ""
    return (
        f"{parity.backend} ({parity.version}{label})",
        result,
        parity.arithmetic,
        f"{_number(figures.mean_kl)} (≤ {tolerance.mean_kl:g})",
        _number(figures.largest_kl),
        f"{figures.agreement:.2%} (≥ {tolerance.agreement:.0%})",
        f"{figures.largest_gap:.3f}",
        _number(figures.perplexity, 6),
        _number(parity.greedy_kl) if parity.greedy else "",
        ", ".join(_continuation(one) for one in parity.greedy),
    )


def _continuation(figures: Figures) -> str:
    if figures.first_mismatch is None:
        return f"{figures.positions} same"
    return f"{figures.first_mismatch} same, then a gap of {figures.largest_gap:.2g}"


def _number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if math.isfinite(value) else "not a number"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
