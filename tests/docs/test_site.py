"""The site builds strictly; its pages load nothing from elsewhere, and every page is in the navigation."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import browser
import pytest
import yaml
from fences import ROOT

import edgelm

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}
NOT_LOADED = {"canonical", "prev", "next", "alternate", "author"}


class Loaded(HTMLParser):
    """Collects the addresses that a page loads by itself, and the names that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.names: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.names.add(given.get("id") or "")
        address = given.get(LOADED.get(tag, ""))
        if address and given.get("rel") not in NOT_LOADED:
            self.addresses.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("zensical") is None:
        pytest.skip("zensical is not installed: pip install '.[docs]'")
    project = tmp_path_factory.mktemp("site")
    for name in ("docs", "edgelm"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", project)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "site"


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        away = [address for address in Loaded(page).addresses if re.match(r"(https?:)?//", address)]
        assert not away, f"{page.name} loads {away}"
    for style in site.rglob("*.css"):
        away = re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*", style.read_text(encoding="utf-8"))
        assert not away, f"{style.name} loads {away}"


@pytest.mark.skipif(browser.installed() is None, reason="no Chromium here")
def test_a_page_in_a_browser_asks_for_its_own_files_only(site: Path) -> None:
    with browser.browser() as page:
        page.open(site / "api.html", 1000, 800)
        assert page.requests
        assert all(one.startswith(("file:", "data:", "blob:")) for one in page.requests), page.requests


def test_every_public_name_can_be_linked_to(site: Path) -> None:
    names = Loaded(site / "api.html").names
    modules = [f"edgelm.{name}" for name in edgelm.__all__ if f"edgelm.errors.{name}" not in names]
    assert not set(modules) - names
    assert {"edgelm.aio.iterate", "edgelm.sizes.parse_size", "edgelm.sizes.human", "edgelm.Model.stream"} <= names


def test_every_page_is_in_the_navigation() -> None:
    """A page without a place there is found by nobody; each is there once."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
