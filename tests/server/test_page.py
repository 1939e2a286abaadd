"""The page in a real browser: streams, stops, edits and tries again; on a phone, by keyboard, for a screen reader."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, browser, installed
from serving import Running, running

from edgelm.engine.forward import Engine

pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium here")
PICTURES = os.environ.get("EDGELM_PICTURES")
ANSWERED = "document.querySelectorAll('article.assistant:not([aria-busy])').length === {}"


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def served(models: dict[str, Path]) -> Iterator[Running]:
    with running(models, sampling={"max_tokens": 12}) as server:
        yield server


def opened(page: Browser, server: Running, width: int = 1000, height: int = 800, dark: bool = False) -> None:
    page.problems.clear()
    page.requests.clear()
    there = "document.querySelector('#model')?.options.length"
    page.open(f"{server.url}/", width, height, dark=dark, until=there)
    if page.value("document.querySelectorAll('article').length"):  # of the test before
        page.value("document.getElementById('clear').click()")


def ask(page: Browser, text: str) -> None:
    page.value("document.getElementById('question').focus()")
    page.type(text)
    page.press("Enter", "\r")


def texts(page: Browser, kind: str) -> list[str]:
    found = page.value(f"[...document.querySelectorAll('article.{kind} > div')].map(one => one.textContent)")
    assert isinstance(found, list)
    return found


def picture(page: Browser, name: str) -> None:
    """Keep a picture where `EDGELM_PICTURES` says, for people to look at."""
    if PICTURES:
        page.picture(Path(PICTURES, f"{name}.png"))


def test_a_question_is_answered_and_asked_again(page: Browser, served: Running) -> None:
    opened(page, served)
    ask(page, "the cat")
    page.wait(ANSWERED.format(1))
    (first,) = texts(page, "assistant")
    assert first
    assert page.value("document.querySelectorAll('#tokens rect').length") >= 12 * 4
    assert "MB of 2000 MB" in page.value("document.getElementById('memory-text').textContent")
    assert "tok/s" in page.value("document.getElementById('speed-text').textContent")
    assert page.value("document.activeElement.id") == "question"
    ask(page, "and the dog")
    page.wait(ANSWERED.format(2))
    picture(page, "page")
    page.value(
        "[...document.querySelectorAll('article.assistant button')].find(b => b.textContent === 'Retry').click()"
    )
    page.wait(ANSWERED.format(1))
    assert texts(page, "assistant") == [first]
    page.value("document.querySelector('article.user button').click()")
    assert texts(page, "user") == []
    assert page.value("document.getElementById('question').value") == "the cat"
    assert page.problems == []
    assert all(url.startswith((served.url, "data:")) for url in page.requests)


def test_escape_stops_an_answer(page: Browser, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compute = Engine._pass

    def slowly(self: Engine, *given: Any, **named: Any) -> None:
        time.sleep(0.05)
        compute(self, *given, **named)

    monkeypatch.setattr(Engine, "_pass", slowly)
    with running(models) as server:
        opened(page, server)
        ask(page, "the cat")
        page.wait("document.querySelector('article.assistant > div')?.textContent.length > 1")
        picture(page, "writing")
        assert page.value("!document.getElementById('stop').hidden && document.getElementById('send').hidden")
        page.press("Escape")
        page.wait("document.getElementById('told').textContent === 'Stopped.'")
        assert page.value("document.getElementById('stop').hidden")
        assert len(texts(page, "assistant")) == 1


def test_model_and_budget_are_chosen(page: Browser, served: Running) -> None:
    opened(page, served)
    page.value("document.getElementById('model').value = 'second'")
    ask(page, "the cat")
    page.wait(ANSWERED.format(1))
    assert served.pool.name == "second"
    for memory, said in (("1GB", "The budget is 1000 MB now."), ("1MB", "too small")):
        page.value(f"document.getElementById('budget').value = '{memory}'")
        page.value("document.getElementById('budget-form').requestSubmit()")
        page.wait(f"document.getElementById('told').textContent.includes('{said}')")
    page.value("document.getElementById('budget').value = '2GB'")
    page.value("document.getElementById('budget-form').requestSubmit()")
    page.wait("document.getElementById('told').textContent.includes('2000 MB')")


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_nothing_is_cut_off(page: Browser, served: Running, dark: bool) -> None:
    opened(page, served, 360, 640, dark)
    ask(page, "the cat " * 20)
    page.wait(ANSWERED.format(1))
    picture(page, f"phone-{'dark' if dark else 'light'}")
    assert page.value("document.documentElement.scrollWidth") <= 360
    for name in ("question", "send", "model", "budget"):
        box = page.value(
            f"(box => [box.left, box.right, box.bottom])(document.getElementById('{name}').getBoundingClientRect())"
        )
        assert box[0] >= 0
        assert box[1] <= 360
        assert box[2] <= 640


def test_a_screen_reader_hears_names_and_roles(page: Browser, served: Running) -> None:
    opened(page, served)
    tree = page.tree()
    for role, name in (
        ("textbox", "Question"), ("button", "Send"), ("combobox", "Model"), ("textbox", "Budget"),
        ("log", "Conversation"), ("meter", "Memory of the process"), ("status", ""), ("heading", "edgelm"),
    ):  # fmt: skip
        assert any(one["role"] == role and one["name"].startswith(name) for one in tree), (role, name)
    assert not [one for one in tree if one["role"] in ("button", "textbox", "combobox") and not one["name"]]


MARKDOWN = """
# Fruit & "more" &lt;

**bold** *soft* ~~gone~~ `a &lt; b` <img src=x onerror=alert(1)> [bad](javascript:alert(1)) [good](https://example.org/)

| name | n |
|------|---|
| **fig** | 1 |

1. one
   - inner <script>alert(1)</script>
2. two

> said

```js
<b>x</b>
```
"""


def test_an_answer_is_formatted_and_cannot_become_markup(page: Browser, served: Running) -> None:
    opened(page, served)
    page.value(
        "import('/page/text.js').then(({ show }) => { const box = document.createElement('div'); box.id = 'shown';"
        f" document.body.append(box); show(box, {json.dumps(MARKDOWN)}); }})"
    )
    page.wait("document.querySelector('#shown pre') !== null")

    def text(selector: str) -> Any:
        return page.value(f"[...document.querySelectorAll('#shown {selector}')].map(one => one.textContent)")

    assert page.value("document.querySelectorAll('#shown img, #shown script').length") == 0
    assert text("h3") == ['Fruit & "more" <']
    assert [text(name) for name in ("p strong", "em", "del", "p code")] == [["bold"], ["soft"], ["gone"], ["a &lt; b"]]
    assert text("td") == ["fig", "1"]
    assert text("ol > li > ul > li") == ["inner <script>alert(1)</script>"]
    assert text("blockquote") == ["said"]
    assert text("pre") == ["<b>x</b>"]
    assert page.value("[...document.querySelectorAll('#shown a')].map(one => one.href)") == ["https://example.org/"]


def test_an_answer_that_nests_too_deeply_is_shown_as_it_is(page: Browser, served: Running) -> None:
    opened(page, served)
    deep = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "> " * 5000 + "deep"}]
    page.value(f"localStorage.setItem('edgelm.chat', {json.dumps(json.dumps(deep))})")
    page.open(f"{served.url}/", 1000, 800, until="document.querySelectorAll('article').length === 2")
    assert texts(page, "assistant")[0].endswith("> deep")
    page.wait("document.getElementById('model').options.length")
    assert page.problems == []
    page.value("document.getElementById('clear').click()")


def test_a_key_that_is_right_ends_the_complaint(page: Browser, models: dict[str, Path]) -> None:
    with running(models, key="secret") as server:
        page.open(f"{server.url}/", 1000, 800, until="document.querySelector('#told.bad')")
        page.value("document.getElementById('settings-open').click()")
        page.value("document.getElementById('key').value = 'secret'")
        page.value("document.getElementById('settings').close()")
        page.wait("document.getElementById('model').options.length === 2")
        assert page.value("document.getElementById('told').textContent") == ""


def test_a_retry_that_fails_leaves_the_old_answer(page: Browser, models: dict[str, Path]) -> None:
    with running(models, sampling={"max_tokens": 4}) as server:
        opened(page, server)
        ask(page, "the cat")
        page.wait(ANSWERED.format(1))
        said = texts(page, "assistant")
    page.value("[...document.querySelectorAll('button')].find(b => b.textContent === 'Retry').click()")
    page.wait("document.getElementById('told').textContent === 'The server does not answer.'")
    page.wait(ANSWERED.format(1))
    assert texts(page, "assistant") == said
    assert json.loads(page.value("localStorage.getItem('edgelm.chat')"))[-1]["content"] == said[0]


def test_the_conversation_is_there_again_after_a_reload(page: Browser, served: Running) -> None:
    opened(page, served)
    ask(page, "the cat")
    page.wait(ANSWERED.format(1))
    said = texts(page, "user") + texts(page, "assistant")
    page.open(f"{served.url}/", 1000, 800, until="document.querySelectorAll('article').length === 2")
    assert texts(page, "user") + texts(page, "assistant") == said
    ask(page, "and on")
    page.wait(ANSWERED.format(2))
    page.value("document.getElementById('clear').click()")
    assert page.value("localStorage.getItem('edgelm.chat')") == "[]"


def test_memory_is_shown_without_a_question(page: Browser, served: Running) -> None:
    opened(page, served)
    page.wait("document.getElementById('memory').value > 1e7")
    assert page.value("document.getElementById('memory').max") == 2e9


def test_it_is_there_within_a_second(page: Browser, served: Running) -> None:
    opened(page, served)
    painted = "performance.getEntriesByName('first-contentful-paint')[0]"
    page.wait(f"{painted} !== undefined")
    assert page.value(f"{painted}.startTime") < 1000
