"""Cut text into the words inside which byte-pair merges happen, as libllama does for each `tokenizer.ggml.pre`.

Knows regular expressions and names of pre-tokenizers; knows no vocabulary. Most patterns run over class bytes
(see unicode_classes), those that name scripts by range run over the text with its white space made ASCII.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from edgelm.errors import UnsupportedModel
from edgelm.text.unicode_classes import class_bytes

Stage = Callable[["_Views", list[int]], list[int]]

_L, _N, _M = "A-Za-z\xd2", "0-9\xd1", "\xd4"
_P, _S = r"!-#%-*,\-./:;?@\[\\\]_{}" + "\xd3", r"$+<=>\^`|~" + "\xd5"
_UPPER, _LOWER = "A-Z\xd2", "a-z\xd2"  # libllama knows case in ASCII only
_CONTRACTION = "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
_TAIL = r"|\s+(?!\S)|\s+"
_NEWLINES = r"|\s*[\r\n]+" + _TAIL
_WORD = rf"[^\r\n{_L}{_N}]?[{_L}]+"
_SYMBOLS = rf"| ?[^\s{_L}{_N}]+[\r\n]*"

_GPT2 = rf"'(?:[stmd]|re|ve|ll)| ?[{_L}]+| ?[{_N}]+| ?[^\s{_L}{_N}]+" + _TAIL
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|[{_N}]{{1,3}}" + _SYMBOLS + _NEWLINES
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|[{_N}]" + _SYMBOLS + _NEWLINES
_QWEN35 = (
    rf"{_CONTRACTION}|[^\r\n{_L}{_N}]?[{_L}{_M}]+|[{_N}]| ?[^\s{_L}{_M}{_N}]+[\r\n]*" + _NEWLINES
)  # fmt: skip
_MINICPM5 = rf"{_CONTRACTION}|{_WORD}|[{_N}]+" + _SYMBOLS + _NEWLINES
_UFAKZEKA = rf"{_WORD}|[{_N}]" + _SYMBOLS + _NEWLINES
_JAIS2 = (
    rf"{_CONTRACTION}|{_WORD}|[{_N}]{{1,3}}" + _SYMBOLS + r"|\s*[\r\n]+"
    + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s"
)  # fmt: skip
_BAILING = rf"{_CONTRACTION}|{_WORD}|[{_N}]" + _SYMBOLS + r"|\s*[\r\n]" + _TAIL
_SEED = rf"{_CONTRACTION}|{_WORD}|[{_N}]| ?[^\s{_L}{_N}\r\n]+" + _NEWLINES
_EXAONE_MOE = (
    rf"{_CONTRACTION}|[^\r\n{_L}{_N}]?(?:[{_L}][{_M}]*(?: [{_L}][{_M}]*)*)+|[{_N}]"
    rf"| ?[^\s{_L}{_N}]+[\r\n/]?|\s*[\r\n]" + _TAIL
)
_CASED = rf"[^\r\n{_L}{_N}]?"
_TEKKEN_WORD = rf"{_CASED}[{_UPPER}]*[{_LOWER}]+|{_CASED}[{_UPPER}]+[{_LOWER}]*"
_SLASHED = rf"| ?[^\s{_L}{_N}]+[\r\n/]*" + _NEWLINES
_TEKKEN = _TEKKEN_WORD + rf"|[{_N}]" + _SLASHED
_GPT4O = (
    rf"{_CASED}[{_UPPER}]*[{_LOWER}]+(?:{_CONTRACTION})?|{_CASED}[{_UPPER}]+[{_LOWER}]*(?:{_CONTRACTION})?|[{_N}]{{1,3}}"
    + _SLASHED
)
_MARKED = rf"{_CASED}[{_L}{_M}]+(?:{_CONTRACTION})?"  # every \p{{L?}} is a letter to libllama
_TINY_AYA = _MARKED + rf"|[{_N}]{{1,3}}" + _SLASHED
_YOUTU = _MARKED + rf"|[{_N}]" + _SLASHED
_GRANITE_EMB = (
    rf"{_CASED}[{_UPPER}{_M}]*[{_LOWER}{_M}]+(?:{_CONTRACTION})?|{_CASED}[{_UPPER}{_M}]+[{_LOWER}{_M}]*(?:{_CONTRACTION})?"
    rf"|[{_N}]{{1,3}}" + _SLASHED
)
_ASCII_PUNCTUATED = rf"[!-/:-@\[-`{{-~][A-Za-z]+|[^\r\n{_L}{_P}{_S}]?[{_L}{_M}]+"
_DEEPSEEK3 = _ASCII_PUNCTUATED + rf"| ?[{_P}{_S}]+[\r\n]*" + _NEWLINES
_SPARK = _ASCII_PUNCTUATED + rf"| ?[{_P}{_S}]+|[\r\n]" + _TAIL
_CHAMELEON_MARKS = r"<sentinel:[0-9]+>", r"IMGIMG[A-I]{1,4}Z", r"[\t\n]|    |  "

_CJK_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|" + _CJK_KANA
)
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
    "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_POORLY_SPACED = r" ?[^(\s|.,!?" + "\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_CASED_LETTERS = (
    r"\s?"
    "[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
    "]+"
)


class _Views:
    """One text as the stages see it: class bytes, and the text with all its white space in ASCII."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.classes = class_bytes(text)

    @functools.cached_property
    def plain(self) -> str:
        if self.text.isascii():
            return self.text
        return "".join("\v" if c == 0x0B else char for c, char in zip(self.classes, self.text, strict=True))


def _cut(pattern: re.Pattern[bytes] | re.Pattern[str], subject: bytes | str, ends: list[int]) -> list[int]:
    """Cut each piece at the matches of `pattern` in it; what lies between two matches is a piece too."""
    cut: list[int] = []
    start = 0
    for end in ends:
        at = start
        for match in pattern.finditer(subject, start, end):  # type: ignore[arg-type]
            match_start, match_end = match.span()
            if match_start > at:
                cut.append(match_start)
            if match_end > match_start:
                cut.append(match_end)
            at = match_end
        if at < end:
            cut.append(end)
        start = end
    return cut


def _by_class(pattern: str) -> Stage:
    @functools.cache
    def compiled() -> re.Pattern[bytes]:
        return re.compile(pattern.encode("latin-1"))

    return lambda views, ends: _cut(compiled(), views.classes, ends)


def _by_text(pattern: str) -> Stage:
    @functools.cache
    def compiled() -> re.Pattern[str]:
        return re.compile(pattern, re.ASCII)

    return lambda views, ends: _cut(compiled(), views.plain, ends)


_NUMBER_RUN = re.compile(rf"[{_N}]+".encode("latin-1"))


def _group_digits(views: _Views, ends: list[int]) -> list[int]:
    """Cut numbers into threes from the right; the text before a number stays with its first group."""
    cut: list[int] = []
    start = 0
    for end in ends:
        at = start
        for match in _NUMBER_RUN.finditer(views.classes, start, end):
            first, last = match.span()
            groups = range(first + ((last - first) % 3 or 3), last + 1, 3)
            cut.extend(groups)
            at = last
        if at < end:
            cut.append(end)
        start = end
    return cut


_ASCII_NUMBER = re.compile(rb"[0-9]+")


def _cut_before_threes(views: _Views, ends: list[int]) -> list[int]:
    """Cut where a multiple of three digits is left of a number."""
    cut: list[int] = []
    start = 0
    for end in ends:
        for match in _ASCII_NUMBER.finditer(views.classes, start, end):
            first, last = match.span()
            cut.extend(at for at in range(first + (last - first) % 3, last, 3) if at > start)
        cut.append(end)
        start = end
    return cut


_LINES = _by_class(r"[^\n]+|\n+")
_DIGIT, _GPT2_STAGE = _by_class(f"[{_N}]"), _by_class(_GPT2)
_THREE_DIGITS, _UP_TO_THREE = _by_class("[0-9]{3}"), _by_class(f"[{_N}]{{1,3}}")
_BREAK = _by_class(r"[\r\n]")
_GPT2_STAGES = (_GPT2_STAGE,)
_STARCODER_STAGES = (_DIGIT, _GPT2_STAGE)
_LLAMA3_STAGES, _QWEN2_STAGES = (_by_class(_LLAMA3),), (_by_class(_QWEN2),)
_GPT4O_STAGES, _TINY_AYA_STAGES = (_by_class(_GPT4O),), (_group_digits, _by_class(_TINY_AYA))
_DEEPSEEK3_STAGES = (_UP_TO_THREE, _by_text(_CJK_KANA), _by_class(_DEEPSEEK3))
_DEFAULT_STAGES = (_by_class(rf"[{_P}$+<=>\^~|]+"), _GPT2_STAGE, _by_class(f"[{_N}]+"), _THREE_DIGITS)


class PreTokenizer(NamedTuple):
    """How text is cut into words, and the habits that come with the name.

    `ignore_merges`: a word that is a token is that token. `raw`: merges run over UTF-8 characters with spaces
    written as U+2581, not over the byte alphabet of GPT-2.
    """

    name: str
    stages: Sequence[Stage]
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False

    def words(self, text: str) -> Iterator[str]:
        """Yield the words of `text`, which together are `text`."""
        if not text:
            return
        views, ends = _Views(text), [len(text)]
        for stage in self.stages:
            ends = stage(views, ends)
        start = 0
        for end in ends:
            yield text[start:end]
            start = end


_STAGES_OF_NAMES: tuple[tuple[str, Sequence[Stage]], ...] = (
    ("default", _DEFAULT_STAGES),
    ("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano dbrx smaug-bpe", _LLAMA3_STAGES),
    ("chatglm-bpe glm4 glm5", _LLAMA3_STAGES),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2_STAGES),
    ("qwen35", (_by_class(_QWEN35),)),
    ("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert", _GPT2_STAGES),
    ("jina-v1-en jina-v2-code roberta-bpe mpt olmo jais exaone4 trillion granite-docling", _GPT2_STAGES),
    ("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", _STARCODER_STAGES),
    ("falcon", (_by_class(rf"[{_P}$+<=>\^~|`]+"), _GPT2_STAGE, _THREE_DIGITS)),
    ("minicpm5", (_UP_TO_THREE, _by_class(_MINICPM5))),
    ("jais-2", (_by_class(_JAIS2),)),
    ("ufakzeka", (_by_class(_UFAKZEKA),)),
    ("laguna", (_LINES, *_QWEN2_STAGES)),
    (
        "deepseek-llm",
        (
            _BREAK,
            _by_text(_CASED_LETTERS),
            _by_text(_DEEPSEEK_MARKS),
            _by_text(r"(?<!\s)\s+\Z"),  # the lookbehind changes no match, only the time
            _by_text(_CJK_HANGUL),
            _by_class(f"[{_N}]+"),
        ),
    ),
    (
        "deepseek-coder",
        (_BREAK, _by_class(rf"\s?[{_L}]+"), _by_class(rf"\s?[{_P}]+"), _by_text(_CJK_HANGUL), _DIGIT),
    ),
    ("deepseek-v3 hunyuan-dense joyai-llm hy_v4", _DEEPSEEK3_STAGES),
    ("spark2_5", (_UP_TO_THREE, _by_text(_CJK_KANA), _by_class(_SPARK), _DIGIT)),
    ("youtu", (_by_text(_YOUTU_SCRIPTS), _by_class(_YOUTU))),
    ("afmoe", (_group_digits, _by_text(_ASIAN), _by_class(_DEEPSEEK3))),
    ("poro-chat bloom gpt3-finnish", (_by_text(_POORLY_SPACED),)),
    ("viking", (_by_text(_POORLY_SPACED), _DIGIT)),
    ("tekken", (_by_class(_TEKKEN),)),
    (
        "chameleon",
        (*(_by_class(mark) for mark in _CHAMELEON_MARKS), _DIGIT, _by_class(rf"[{_P}!-/:-@\[-`{{-~]"), _GPT2_STAGE),
    ),
    ("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O_STAGES),
    ("granite-embed-multi-97m", (_by_class(_GRANITE_EMB),)),
    ("tiny_aya cohere2moe", _TINY_AYA_STAGES),
    ("superbpe", (_by_class(f"[{_N}]+"), _cut_before_threes)),
    ("bailingmoe bailingmoe2 llada-moe", (_by_class(_BAILING),)),
    ("seed-coder", (_by_class(_SEED),)),
    ("exaone-moe", (_by_class(_EXAONE_MOE),)),
    ("gemma4 granite-embed-multi-311m sarvam-moe", (_LINES,)),
)
_STAGES = {name: stages for names, stages in _STAGES_OF_NAMES for name in names.split()}
KNOWN_PRE_TOKENIZERS = tuple(sorted(_STAGES))
_BOS_ADDERS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"}
)
_WHOLE_WORDS = _BOS_ADDERS | {"minicpm5", "youtu", "glm4", "glm5", "tekken", "granite-embed-multi-97m"}
_RAW = frozenset({"gemma4", "granite-embed-multi-311m", "sarvam-moe"})


WHOLE = PreTokenizer("", (), raw=True)
"""Cuts nothing: for merges over characters, as the tokenizers library does them."""


def pre_tokenizer(name: str) -> PreTokenizer:
    """Return what `tokenizer.ggml.pre` names; the empty name is `default`, as in libllama.

    Raises `UnsupportedModel` for a name that libllama does not know either, or whose splitter is not here.
    """
    name = name or "default"
    stages = _STAGES.get(name)
    if stages is None:
        raise UnsupportedModel(
            f"the file's pre-tokenizer {name!r} is not known (known: {', '.join(KNOWN_PRE_TOKENIZERS)}); "
            "convert the model again with a current llama.cpp, or use another model"
        )
    return PreTokenizer(
        name,
        stages,
        ignore_merges=name in _WHOLE_WORDS,
        add_bos=name in _BOS_ADDERS or name in {"tekken", "chameleon", "gemma4", "granite-embed-multi-311m"},
        raw=name in _RAW,
    )
