"""Render a chat template that nobody has read: no access to Python, bounded time, steps and sizes.

Gives what Hugging Face's templates rely on. Knows neither tokenizers nor messages. Import it late: jinja2 costs
seven megabytes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from edgelm.errors import TemplateError

MAX_SOURCE_CHARS = 1_000_000
MAX_CHARS = 4_000_000
MAX_NESTING = 4  # a text may be captured and written again
MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
MAX_WIDTH = 10_000
_WIDTH_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDE_FORMAT = re.compile(r"\d{5}|\{[^{}]*\{|%[^a-zA-Z%]*\*")


class Refused(Exception):
    """The template called `raise_exception`: it does not accept these messages."""


class Failed(TemplateError):
    """The template fails with these messages, though it does nothing that it may not."""


class LimitExceeded(Exception):
    """The template does more than a template may."""


class Sandbox:
    """A compiled template. Raises `TemplateError` if the source does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has {len(source)} characters, more than {MAX_SOURCE_CHARS}; give another template"
            )
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (
            JinjaError,
            LimitExceeded,
            RecursionError,
            MemoryError,
            ValueError,
            SyntaxError,
            ArithmeticError,
        ) as error:
            raise TemplateError(
                f"the chat template does not compile: {_reason(error)}; give another template"
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the rendered text.

        Raises `Refused` if the template refuses the messages, `TemplateError` if it fails in any other way.
        """
        self._environment.start()
        try:
            return self._template.render(**variables)
        except Refused:
            raise
        except SecurityError as error:
            raise TemplateError(f"the chat template does what no template may: {_reason(error)}") from error
        except (LimitExceeded, RecursionError, MemoryError, OverflowError) as error:
            raise TemplateError(f"the chat template does not end or grows too large: {_reason(error)}") from error
        except Exception as error:
            raise Failed(
                f"the chat template fails: {_reason(error)}; check the messages or give another template"
            ) from error


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.start()
        self.concat = self._concat  # type: ignore[method-assign]
        self.globals.pop("lipsum", None)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        for name in ("center", "batch", "slice", "wordwrap"):
            self.filters[name] = _narrow(self.filters[name])
        self.filters |= {
            "tojson": _tojson,
            "format": self._checked_format(self.filters["format"]),
            "indent": _checked_indent(self.filters["indent"]),
            "replace": _checked_replace,
            "join": _checked_join(self.filters["join"]),
            "_stepped": self._stepped,
            "_bounded": _bounded,
            "_written": self._written,
        }

    def start(self) -> None:
        """Begin to count anew."""
        self._steps, self._n_written, self._deadline = 0, 0, time.monotonic() + MAX_SECONDS

    def _step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise LimitExceeded(f"more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise LimitExceeded(f"more than {MAX_SECONDS:.0f} seconds")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def _stepped(self, items: Any) -> Any:
        return _Stepped(items, self._step)

    def _written(self, value: Any) -> str:
        """Return `value` as text, and count it: pieces of a captured block wait unjoined."""
        text = str(value)
        self._n_written += len(text)
        _check_size(self._n_written // MAX_NESTING)
        return text

    def _concat(self, pieces: Iterable[str]) -> str:
        kept, n_chars = [], 0
        for piece in pieces:
            n_chars += len(piece)
            _check_size(n_chars)
            kept.append(piece)
        return "".join(kept)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        return _bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, getattr(__obj, "__name__", ""), args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        plain = super().wrap_str_format(value)
        if plain is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            return plain(*args, **kwargs)

        return checked

    @staticmethod
    def _checked_format(plain: Callable[..., Any]) -> Callable[..., Any]:
        def checked(value: str, *args: Any, **kwargs: Any) -> Any:
            _check_format(str(value))
            return _bounded(plain(value, *args, **kwargs))

        return checked


class _Instrument(NodeTransformer):
    """Counts the steps of every loop and what is written, and bounds every `~`."""

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            part if isinstance(part, nodes.TemplateData) else _filtered(part, "_written") for part in node.nodes
        ]
        return node

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_stepped")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, "_bounded")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Stepped:
    """Any iterable, counted; keeps a length so that `loop.length` need not copy."""

    def __init__(self, items: Any, step: Callable[[], None]) -> None:
        self._items, self._step = items, step

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._step()
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Generation(Extension):
    """`{% generation %}` marks the answer for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise Refused(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 256:
        raise LimitExceeded("a date pattern of more than 256 characters")
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    if (isinstance(indent, int) and indent > 16) or (isinstance(indent, str) and len(indent) > 16):
        raise LimitExceeded("an indent of more than 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_size(n_items: int) -> None:
    if n_items > MAX_CHARS:
        raise LimitExceeded(f"more than {MAX_CHARS} characters")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)):
        _check_size(len(value))
    return value


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > 4096:
            raise LimitExceeded("a number of more than 4096 bits")
    elif isinstance(left, int):
        _check_size(left * len(right) if hasattr(right, "__len__") else 0)
    elif isinstance(right, int):
        _check_size(right * len(left) if hasattr(left, "__len__") else 0)


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > 4096:
        raise LimitExceeded("a number of more than 4096 bits")


def _check_format(pattern: str) -> None:
    if _WIDE_FORMAT.search(pattern):
        raise LimitExceeded("a format with a width of more than 9999 or a computed one")


def _check_method(owner: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    values = (*args, *kwargs.values())
    if name in _WIDTH_METHODS and any(isinstance(value, int) and value > MAX_WIDTH for value in values):
        raise LimitExceeded(f"a width of more than {MAX_WIDTH}")
    if name == "expandtabs":
        _check_size(len(owner) + owner.count("\t") * MAX_WIDTH)
    if name in ("format", "format_map"):
        _check_format(owner)
    if name == "replace" and len(values) >= 2:
        _checked_replace(owner, str(values[0]), str(values[1]))
    if name == "join" and args:
        _check_joined(args[0], owner)
    if name == "translate":
        raise SecurityError("str.translate is not for templates")


def _checked_replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text, old, new = str(value), str(old), str(new)
    found = text.count(old) if count is None else min(count, text.count(old))
    _check_size(len(text) + found * (len(new) - len(old)))
    return text.replace(old, new, -1 if count is None else count)


def _check_joined(items: Any, separator: str) -> None:
    if isinstance(items, (list, tuple, str)):
        longest = sum(len(item) for item in items if isinstance(item, str))
        _check_size(longest + len(items) * len(separator))


def _checked_join(plain: Callable[..., Any]) -> Callable[..., Any]:
    def checked(context: Any, value: Any, d: str = "", attribute: Any = None) -> Any:
        items = value if isinstance(value, (str, list, tuple)) else list(value)
        _check_joined(items, str(d))
        return _bounded(plain(context, items, d, attribute))

    return _with_pass_arg(checked, plain)


def _checked_indent(plain: Callable[..., Any]) -> Callable[..., Any]:
    def checked(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        _check_size(len(s) + (s.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
        return str(plain(s, width, first, blank))

    return checked


def _narrow(plain: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, int) and value > MAX_WIDTH for value in (*args[1:], *kwargs.values())):
            raise LimitExceeded(f"a width of more than {MAX_WIDTH}")
        return _bounded(plain(*args, **kwargs))

    return _with_pass_arg(checked, plain)


def _with_pass_arg(checked: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Give `checked` the first argument (context, environment) that jinja2 would give `plain`."""
    if hasattr(plain, "jinja_pass_arg"):
        checked.jinja_pass_arg = plain.jinja_pass_arg  # type: ignore[attr-defined]
    return checked
