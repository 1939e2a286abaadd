"""What the caller of `edgelm.load` asked for, as one value. Checks nothing."""

from __future__ import annotations

from typing import NamedTuple


class Wishes(NamedTuple):
    """How a model is to be loaded; `edgelm.load` says what each of them means. `max_outputs`: rows of logits a
    pass; `parallel`: answers side by side; `attention`, `kept`: see `edgelm.approximate`; `published`: see
    `edgelm.plan`."""

    memory: str | int | None = None
    backend: str = "auto"
    threads: int | None = None
    context: int | None = None
    simulate: str | None = None
    max_outputs: int = 1
    speculate: bool = True
    draft: str | None = None
    kv: str = "f16"
    spill: bool = True
    parallel: int = 1
    attention: str = "exact"
    kept: float | None = None
    published: bool = False
