"""Answers in a form that is asked for: a JSON schema, a regular expression, or a grammar (Lark or GBNF).

The work is llguidance's (Earley parser over a lexer of derivatives): fast on large vocabularies. Here its masks become
a sampler's business: a token that cannot go on is forbidden, one that must come next is guessed for free.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.closing import Bytes, Ending
from edgelm.engine.sampling import Logits, Sampler
from edgelm.errors import ConfigError
from edgelm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

BASE_BYTES, BYTES_PER_TOKEN = 12_000_000, 230
"""What the library and its table of a vocabulary take in memory."""
_KEPT = 8
"""Compiled forms that are kept."""
_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""One way to write each value: free white space is where small models lose themselves."""


def form_of(json_schema: Mapping[str, Any] | bool | None, regex: str | None, grammar: str | None) -> str | None:
    """Return the form that an answer must have, as llguidance reads it; None if it is free.

    Raises `ConfigError` if more than one is given, or for one that is no schema, expression or grammar at all.
    """
    given = [one for one in (json_schema, regex, grammar) if one is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError("an answer has one form: give one of json_schema, regex and grammar")
    matcher = _library().LLMatcher
    if json_schema is not None:
        try:
            return str(matcher.grammar_from_json_schema(json.dumps(_object_of(json_schema)), _JSON))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the JSON schema is no JSON object ({error}); check its quotes and commas") from error
    if regex is not None:
        return str(matcher.grammar_from_regex(regex))
    assert grammar is not None
    return str(matcher.grammar_from_lark(_as_lark(grammar)))


def _object_of(json_schema: Any) -> dict[str, Any]:
    """Return a schema as an object: the library sets its own options in it."""
    if json_schema is False:
        raise ConfigError("the JSON schema false allows no answer at all; give true, or an object")
    if json_schema is True:
        return {}
    if not isinstance(json_schema, Mapping):
        raise TypeError(f"it is a {type(json_schema).__name__}")
    return dict(json_schema)


def _as_lark(grammar: str) -> str:
    """Return a grammar in Lark's notation; GBNF is llama.cpp's, and known by its `::=`."""
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except GbnfToLarkError as error:
        raise ConfigError(f"the GBNF grammar makes no sense: {error}") from error


class Forms:
    """The forms of one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, n_logits: int) -> None:
        """Build the library's table, which takes some tenths of a second. `n_logits`: ids that a sampler chooses from.

        Raises `ConfigError` for a vocabulary without an end.
        """
        if not tokenizer.eos_ids:
            raise ConfigError("this vocabulary has no token that ends an answer, so none can be kept to a form")
        self._n_logits = n_logits
        self._ends = tokenizer.eos_ids
        # slices would make some masks faster, and the table twice as large
        words = _Words(tokenizer)
        self._table = _library().LLTokenizer(words, eos_token=sorted(tokenizer.eos_ids), slices=[])
        self._bytes = Bytes(words.tokens)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    @staticmethod
    def memory_bytes(tokenizer: Tokenizer) -> int:
        """Return what a table of this vocabulary takes."""
        return BASE_BYTES + BYTES_PER_TOKEN * tokenizer.n_vocab

    def constrain(self, sampler: Sampler, form: str, n_prompt: int, most: int) -> Constrained:
        """Return a sampler that keeps to `form` in what follows a prompt of `n_prompt` ids: up to `most`, with the end.

        Raises `ConfigError` for a form that makes no sense, or uses what the library does not support.
        """
        if form not in self._compiled:
            matcher = _library().LLMatcher(self._table, form, log_level=0)
            if matcher.is_error():
                raise ConfigError(_sentence(matcher.get_error()))
            if len(self._compiled) >= _KEPT:
                self._compiled.popitem(last=False)
            self._compiled[form] = matcher
        self._compiled.move_to_end(form)
        ending = Ending(self._bytes, self._ends)
        return Constrained(sampler, self._compiled[form].deep_copy(), self._n_logits, ending, n_prompt, most)


class Constrained:
    """A sampler for one answer. Histories must grow: it follows them token by token."""

    def __init__(
        self, sampler: Sampler, matcher: LLMatcher, n_logits: int, ending: Ending, n_prompt: int, most: int
    ) -> None:
        self._sampler, self._matcher, self._ending = sampler, matcher, ending
        self._n_seen, self._limit = n_prompt, n_prompt + most
        self._mask = np.zeros(-(-n_logits // 32), np.int32)

    def __call__(self, logits: Logits, history: Sequence[int]) -> int:
        """Draw among the tokens that the form allows, so that the answer can still be ended.

        Raises `ConfigError` if the form is too complex.
        """
        self._follow(history)
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if self._matcher.is_error():
            raise ConfigError(_sentence(self._matcher.get_error()))
        allowed = np.unpackbits(self._mask.view(np.uint8), count=len(logits), bitorder="little")
        if not logits.flags.writeable:
            logits = logits.copy()
        np.copyto(logits, -np.inf, where=allowed == 0)
        return self._ending.taken(self._matcher, self._sampler(logits, history), self._limit - len(history))

    @property
    def closed(self) -> bool:
        """Whether the answer was brought to an end because its limit came near."""
        return self._ending.closed

    def forced(self, history: Sequence[int]) -> Sequence[int]:
        """Return the ids that must come next, if there is no choice."""
        self._follow(history)
        return () if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def _follow(self, history: Sequence[int]) -> None:
        new = list(history[self._n_seen :])
        self._n_seen = len(history)
        if new and not self._ending.ends.intersection(new):
            self._matcher.consume_tokens(new)


class _Words:
    """The vocabulary as llguidance asks for it. Special tokens are never part of a form."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.eos_ids), tokenizer.bos_id
        self.special_token_ids = [i for i in range(tokenizer.n_vocab) if tokenizer.is_special(i)]
        special = frozenset(self.special_token_ids)
        self.tokens = [b"" if i in special else tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_bos=False)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "answers in a given form need llguidance, which is not installed; install it with: "
            "pip install 'edgelm[structured]'"
        ) from error
    return llguidance


def _sentence(message: str) -> str:
    """Return what the library says as one sentence."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = "; ".join(lines[:3])[:300]
    if said.startswith("Unimplemented keys:"):
        return f"the JSON schema uses what is not supported: {said.partition(':')[2].strip()}; leave these keys out"
    if said.startswith("Unsatisfiable schema:"):
        return f"the JSON schema allows no answer at all ({lines[0].partition(':')[2].strip()}); do parts contradict?"
    if said.startswith("oneOf constraints"):  # the library's advice is about an option of its own
        return "the JSON schema uses oneOf with cases that may overlap, which is not supported; write anyOf"
    return f"the form of the answer makes no sense: {said}"
