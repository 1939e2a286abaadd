"""Markdown as lines: what is shown, that it fits, and that a text which grows shows the same in the end."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgelm_apps.terminal import growing
from edgelm_apps.terminal.code import Colours
from edgelm_apps.terminal.growing import Growing, completed
from edgelm_apps.terminal.lines import Line, line_width, shown, wrapped
from edgelm_apps.terminal.markdown import rendered

COLOURS = Colours()
SAMPLE = """\
# A title

Some **bold text** and `code` that is long enough to be broken.
A second line, [linked](http://example.org).

1. **First**
2. second
   - nested

   ```python
   def f():

       return 1
   ```
3. third
- [ ] another list
```python
x = '''one

two'''
```
After it.

| a | b |
|---|---|
| one | two words |
| 日本語 | **x** |

> quoted
> twice

---
~~~
tilde ``` inside
~~~
<b>html</b> and ~~struck~~ text, 日本語テキストの長い行ですから折り返します
"""


def text_of(lines: list[Line]) -> str:
    return "\n".join("".join(text for _, text in line).rstrip() for line in lines)


def shown_as(text: str, width: int = 40) -> str:
    return text_of(rendered(text, width, COLOURS))


def style_of(word: str, text: str) -> str:
    return next(style for line in rendered(text, 60, COLOURS) for style, part in line if word in part)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Title\n\ntext", "Title\n\ntext"),
        ("one\ntwo", "one\ntwo"),
        ("- a\n- b\n  - c", "• a\n• b\n  • c"),
        ("3. a\n4. b", "3. a\n4. b"),
        ("1. word and word again", "1. word and word\n   again"),
        ("> a\n> b", "│ a\n│ b"),
        ("```python\nf()\n```", "── python ──────────\nf()\n────────────────────"),
        ("```\na b c d e f g h i j k l\n```", "────────────────────\na b c d e f g h i j\nk l\n────────────────────"),
        ("| a | b |\n|---|---|\n| one | 2 |", "a   │ b\n────┼──\none │ 2"),
        ("[x](http://y)", "x (http://y)"),
        ("<http://y>", "http://y"),
        ("a\n***\nb", "a\n────────────────────\nb"),
        ("<b>x</b>", "<b>x</b>"),
    ],
)
def test_markdown_is_shown(text: str, expected: str) -> None:
    assert shown_as(text, 20) == expected


def test_styles() -> None:
    assert style_of("b", "a **b** c") == "class:strong"
    assert style_of("b", "a `b` c") == "class:code.inline"
    assert style_of("b", "a ***b*** c") == "class:em class:strong"
    assert "heading" in style_of("b", "## b")
    assert style_of("return", "```python\nreturn 1\n```") == "class:code.keyword"
    assert style_of("return", "```nonsense\nreturn 1\n```") == "class:code"


def test_a_wide_table_breaks_its_cells() -> None:
    text = f"| a | b |\n|---|---|\n| {'word ' * 12} | {'x' * 30} |"
    lines = rendered(text, 40, COLOURS)
    assert all(line_width(line) <= 40 for line in lines)
    assert text_of(lines).count("word") == 12
    assert text_of(lines).count("x") == 30


def test_another_language_is_coloured_only_where_the_budget_has_room() -> None:
    colours = Colours()
    colours.room = lambda n_bytes: False
    assert colours.lines("rust", "fn main() {}") == [[("class:code", "fn main() {}")]]
    assert colours.lines("python", "pass") == [[("class:code.keyword", "pass")]]
    colours.room = lambda n_bytes: True
    assert ("class:code.keyword", "fn") in colours.lines("rust", "fn main() {}")[0]


@pytest.mark.parametrize("width", [1, 2, 17, 40, 80])
def test_lines_fit(width: int) -> None:
    least = max(width, 24 if width < 24 else 0)  # nested lists and tables cannot be narrower than their marks
    assert all(line_width(line) <= least for line in rendered(SAMPLE, width, COLOURS))


FAMILY = "👨\u200d👩\u200d👧"


JOINED = [FAMILY * 20, "👍🏽" * 40, "🇩🇪" * 40, f"```\n{FAMILY * 20}\n```", f"| {FAMILY * 20} |\n|---|"]


@pytest.mark.parametrize("text", JOINED)
def test_joined_letters_are_not_cut_off(text: str) -> None:
    from prompt_toolkit.utils import get_cwidth

    lines = rendered(text, 40, COLOURS)
    assert all(sum(get_cwidth(part) for _, part in line) <= 40 for line in lines)
    assert text_of(lines).count("👩") == text.count("👩")


def test_what_is_nested_deeply_is_shown() -> None:
    text = "\n".join("  " * level + f"- item {level}" for level in range(30))
    assert "item 29" in text_of(rendered(text, 80, COLOURS))


def test_a_table_of_too_many_columns_loses_none() -> None:
    names = [f"c{number}" for number in range(12)]
    text = f"| {' | '.join(names)} |\n|{'---|' * 12}\n| {' | '.join(names)} |"
    lines = rendered(text, 40, COLOURS)
    assert all(line_width(line) <= 40 for line in lines)
    assert text_of(lines).count("c11") == 2


@settings(deadline=None, max_examples=60)
@given(st.text(alphabet="ab 日é\n-", max_size=80), st.integers(2, 20))
@example(" 日", 2)
def test_wrapping_loses_nothing_but_blanks(text: str, width: int) -> None:
    lines = wrapped([("class:x", text)], width)
    assert all(line_width(line) <= width for line in lines)
    assert "".join(text_of(lines).split()) == "".join(text.split())


def test_a_word_of_several_styles_is_not_torn() -> None:
    assert text_of(wrapped([("", "one "), ("class:strong", "two"), ("", ", three")], 7)) == "one\ntwo,\nthree"


def test_control_characters_are_not_shown() -> None:
    assert shown("a\x1b[31mb\x07\tc\u202e") == "a[31mb  c"


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_what_grows_shows_what_it_is_in_the_end(data: st.DataObject) -> None:
    whole, parts = Growing(COLOURS), Growing(COLOURS)
    whole.feed(SAMPLE)
    rest = SAMPLE
    while rest:
        n_letters = data.draw(st.integers(1, 40))
        parts.feed(rest[:n_letters])
        rest = rest[n_letters:]
        parts.lines(data.draw(st.sampled_from([40, 60])))
    for one in (whole, parts):
        one.end()
    assert parts.lines(50) == whole.lines(50)
    assert parts.lines(50)[1] == []


def test_the_parts_show_what_the_whole_text_shows() -> None:
    text = SAMPLE.replace("- [ ] another list\n", "")
    grown = Growing(COLOURS)
    grown.feed(text)
    grown.end()
    assert text_of(grown.lines(60)[0]) == shown_as(text.rstrip("\n"), 60)


def test_what_is_whole_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(growing, "rendered", lambda text, width, colours: seen.append(text) or [[("", text)]])
    grown = Growing(COLOURS)
    for number in range(100):
        grown.feed(f"word {number}\n\n")
        grown.lines(40)
    assert len(seen) <= 300
    assert max(map(len, seen)) <= len("word 99\n\nword 99")


def test_an_open_fence_colours_each_line_once() -> None:
    coloured: list[str] = []

    class Counting(Colours):
        def lines(self, language: str, code: str) -> list[Line]:
            coloured.append(code)
            return [[("", line)] for line in code.split("\n")]

    grown = Growing(Counting())
    grown.feed("```python\n")
    for number in range(50):
        grown.feed(f"x = {number}\n")
        grown.lines(40)
    assert coloured == [f"x = {number}" for number in range(50)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **b", "a **b**"), ("a **b ", "a **b**"), ("a **", "a"), ("a **b*", "a **b**"), ("a **b** c", "a **b** c"),
        ("use `x", "use `x`"), ("use `", "use"), ("**a\n\nb", "**a\n\nb"), ("```\n`", "```\n`"),
    ],
)  # fmt: skip
def test_what_is_open_is_closed_while_it_grows(text: str, expected: str) -> None:
    assert completed(text) == expected
