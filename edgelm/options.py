"""What a generation can be asked for, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from edgelm.engine.logprobs import MOST
from edgelm.engine.sampling import Processor, Sampler, Sampling, make_sampler
from edgelm.errors import ConfigError
from edgelm.text.stops import StopMatcher

if TYPE_CHECKING:
    from edgelm.text.tokenizer import Tokenizer


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


class Asked(NamedTuple):
    """What a stream was asked for, checked. `form`: see `edgelm.structured`; `n_top`: log-probabilities to note."""

    max_tokens: int | None
    timeout_s: float | None
    sampler: Sampler
    form: str | None
    n_top: int | None
    matcher: StopMatcher
    ignores_ends: bool
    speculates: bool


def asked_for(options: Options, tokenizer: Tokenizer) -> Asked:
    """Return what these options mean. Raises `ConfigError` for one that is unknown, or has a value that cannot work."""
    given = dict(options)
    max_tokens, timeout_s, n_top = options.get("max_tokens"), options.get("timeout_s"), options.get("logprobs")
    for name in OWN_OPTIONS:
        given.pop(name, None)
    if max_tokens is not None and max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
    if timeout_s is not None and timeout_s <= 0:
        raise ConfigError(f"timeout_s must be above 0 seconds, got {timeout_s}")
    if n_top is not None and not 0 <= n_top <= MOST:
        raise ConfigError(f"logprobs must be between 0 and {MOST} alternatives, got {n_top}")
    if given.get("dry_multiplier"):
        given["dry_breakers"] = tokenizer.containing(frozenset(options.get("dry_breakers", DRY_BREAKERS)))
    sampler = make_sampler(sampling_of(given), tuple(options.get("processors", ())))
    form = None
    if any(name in options for name in FORMS):
        from edgelm.structured import form_of

        form = form_of(options.get("json_schema"), options.get("regex"), options.get("grammar"))
    stop = options.get("stop", ())
    matcher = StopMatcher([stop] if isinstance(stop, str) else stop)
    speculates = options.get("speculate", True)
    return Asked(
        max_tokens, timeout_s, sampler, form, n_top, matcher, bool(options.get("ignore_eos")), speculates
    )  # fmt: skip


def sampling_of(options: dict[str, Any]) -> Sampling:
    """Return the fields of `Sampling` among these options. Raises `ConfigError` for a name that is none."""
    known = Sampling.__slots__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} (known: {', '.join(sorted((*Options.__annotations__,)))})")
    return Sampling(**options)
