"""What a generation can be asked for, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from edgelm.engine.sampling import Processor, Sampling
from edgelm.errors import ConfigError


class Options(TypedDict, total=False):
    """Options of a generation; those not listed here by name are fields of `Sampling`."""

    max_tokens: int | None
    stop: str | Iterable[str]
    ignore_eos: bool
    timeout_s: float | None
    processors: Sequence[Processor]
    speculate: bool
    logprobs: int | None
    json_schema: Mapping[str, Any] | bool
    regex: str
    grammar: str
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_breakers: Iterable[str]
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat_tau: float
    mirostat_eta: float
    logit_bias: dict[int, float]
    seed: int | None


DRY_BREAKERS = ("\n", ":", '"', "*")
"""Texts that end a repetition, unless others are given: those of llama.cpp."""
FORMS = ("json_schema", "regex", "grammar")
OWN_OPTIONS = (
    "max_tokens",
    "stop",
    "ignore_eos",
    "timeout_s",
    "processors",
    "speculate",
    "logprobs",
    "dry_breakers",
    *FORMS,
)


def sampling_of(options: dict[str, Any]) -> Sampling:
    """Return the fields of `Sampling` among these options. Raises `ConfigError` for a name that is none."""
    known = Sampling.__slots__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} (known: {', '.join(sorted((*Options.__annotations__,)))})")
    return Sampling(**options)
