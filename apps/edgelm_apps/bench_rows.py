"""What `edgelm bench` found, a row for each test of each combination, as Markdown, JSON or CSV. Measures nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True, slots=True)
class BenchTest:
    """`n` tokens of a prompt in one go ("pp"), or `n` passes of one token ("tg"), with `depth` tokens in the cache."""

    kind: str
    n: int
    depth: int

    def __str__(self) -> str:
        return f"{self.kind}{self.n}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the result. `failed` says why there are no `samples`: tokens a second, one for each repetition.

    `memory` is what was asked for, `budget_bytes` what came of it; `limit` says which limit the system kept the process
    to, where sides are compared. `needed_bytes`: the smallest budget, where it was refused;
    `exit_code`: what a command that does only this would end with.
    """

    model: str
    size_bytes: int
    params: int
    engine: str
    backend: str | None
    threads: int | None
    kv: str | None
    memory: str
    budget_bytes: int | None
    limit: str | None
    simulated: str | None
    test: str | None
    samples: tuple[float, ...] = ()
    peak_bytes: int | None = None
    read_bytes_per_token: float | None = None
    failed: str | None = None
    needed_bytes: int | None = None
    exit_code: int = 0

    @property
    def tps(self) -> float | None:
        return mean(self.samples) if self.samples else None

    @property
    def tps_sd(self) -> float | None:
        """Sample standard deviation, 0 for a single repetition."""
        if not self.samples:
            return None
        return stdev(self.samples) if len(self.samples) > 1 else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"samples": list(self.samples), "tps": self.tps, "tps_sd": self.tps_sd}


def as_markdown(rows: Sequence[Row]) -> str:
    """Return a table in the manner of llama-bench; columns that say nothing are left out."""
    header = ["model", "size", "params", "backend", "threads", "kv"]
    header += ["budget", "limit", "simulated", "test", "t/s", "peak"]
    cells = [_cells(row) for row in rows]
    shown = [i for i in range(len(header) + 1) if any(line[i] for line in cells)]
    table = [[(*header, "read/token")[i] for i in shown], *([line[i] for i in shown] for line in cells)]
    widths = [max(len(line[i]) for line in table) for i in range(len(shown))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in table]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def as_csv(rows: Sequence[Row]) -> str:
    """Return a header and a line for each row; the samples are separated by spaces."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [*(field.name for field in fields(Row)), "tps", "tps_sd"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_dict() | {"samples": " ".join(f"{value:.6g}" for value in row.samples)} for row in rows)
    return out.getvalue().rstrip("\n")


def _cells(row: Row) -> tuple[str, ...]:
    from edgelm.sizes import human

    budget = human(row.budget_bytes) if row.budget_bytes else ""
    return (
        row.model,
        human(row.size_bytes),
        _millions(row.params),
        row.backend or row.engine,
        str(row.threads or ""),
        "" if row.kv in (None, "f16", "f32") else row.kv,
        budget if row.memory != "auto" else f"auto ({budget})" if budget else "auto",
        row.limit or "",
        row.simulated or "",
        row.test or "",
        _speed(row),
        human(row.peak_bytes) if row.peak_bytes else "",
        "" if row.read_bytes_per_token is None else human(row.read_bytes_per_token),
    )


def _speed(row: Row) -> str:
    from edgelm.sizes import human

    if row.tps is not None:
        return f"{row.tps:.2f} ± {row.tps_sd:.2f}"
    if row.needed_bytes is not None:
        return f"refused: needs {human(row.needed_bytes)}"
    return f"failed: {row.failed}"


def _millions(params: int) -> str:
    return f"{params / 1e9:.2f} B" if params >= 1e9 else f"{params / 1e6:.2f} M"
