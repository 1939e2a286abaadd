"""What is released is whole: the wheel and the source archive, their metadata, the changelog, and the extras."""

from __future__ import annotations

import ast
import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import edgelm

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
LEFT_OUT = {"__pycache__"}
ADDRESS = re.compile(r"https?://(?!127\.0\.0\.1)[^\s>)]*")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built from this tree."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling builds the package: pip install hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob(f"edgelm-{edgelm.__version__}-*.whl")
    return zipfile.ZipFile(path)


def files_of(package: str) -> set[str]:
    """Return the files of a package as they lie in a wheel."""
    folder = ROOT / package
    found = (path for path in folder.rglob("*") if path.is_file() and not LEFT_OUT & set(path.parts))
    return {path.relative_to(folder.parent).as_posix() for path in found}


def test_the_wheel_holds_every_file_of_every_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    about = f"edgelm-{edgelm.__version__}.dist-info/"
    packed = {name for name in wheel.namelist() if not name.startswith(about)}
    assert packed == set().union(*map(files_of, PACKAGES))
    for package in PACKAGES:
        assert f"{Path(package).name}/py.typed" in packed
    assert "edgelm_apps/server/page/index.html" in packed
    assert "edgelm_apps/profiling/page.html.j2" in packed
    assert f"{about}licenses/LICENSE" in wheel.namelist()
    sources = {Path(name).parts[0] for name in packed}
    assert sources == {Path(package).name for package in PACKAGES}, "no tests, benchmarks or weights"


def test_every_package_of_the_tree_is_in_the_wheel() -> None:
    found = {path.parent for root in ("backends", "models", "apps") for path in (ROOT / root).glob("*/__init__.py")}
    found.discard(ROOT / "apps/edgelm_examples")  # to be read and copied, not installed
    assert {path.relative_to(ROOT).as_posix() for path in found} | {"edgelm"} == set(PACKAGES)


def test_the_source_archive_holds_what_builds_and_tests(built: Path) -> None:
    (path,) = built.glob("edgelm-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "README.md", "pyproject.toml", "tests/conftest.py", "docs/cli.md"} <= names
    assert not [name for name in names if name.endswith((".gguf", ".safetensors"))]


def test_the_metadata_is_complete_and_sends_nobody_elsewhere(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(f"edgelm-{edgelm.__version__}.dist-info/METADATA").decode()
    about = email.message_from_string(text)
    assert about["Version"] == edgelm.__version__
    assert about["License-Expression"] == "Apache-2.0"
    for field in ("Summary", "Keywords", "Requires-Python", "Description-Content-Type"):
        assert about[field], field
    assert about.get_payload().startswith("# edgelm")
    assert not ADDRESS.findall(text)
    points = wheel.read(f"edgelm-{edgelm.__version__}.dist-info/entry_points.txt").decode()
    for group in ("console_scripts", "llm", "edgelm.backends", "edgelm.architectures"):
        assert f"[{group}]" in points


def test_the_changelog_agrees_with_the_version() -> None:
    """`## Unreleased` on top, then `## 1.2.3 (2030-01-31)`, newest first; the newest is not above the version."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *released = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "Unreleased"
    matched = [re.fullmatch(r"(\d+)\.(\d+)\.(\d+) \((\d{4}-\d\d-\d\d)\)", title) for title in released]
    assert None not in matched, "a section is called `1.2.3 (2030-01-31)`"
    order = [((int(m[1]), int(m[2]), int(m[3])), m[4]) for m in matched if m is not None]
    assert order == sorted(order, reverse=True)
    assert len(dict(order)) == len(order)
    now = tuple(int(part) for part in re.findall(r"\d+", edgelm.__version__))
    unreleased = text.partition("## Unreleased")[2].partition("\n## ")[0].strip()
    if not order or now != order[0][0]:
        assert not order or now > order[0][0]
        assert unreleased, f"nothing says what {edgelm.__version__} brings"


def test_the_version_is_said_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "edgelm/__init__.py"


def test_every_hint_names_an_extra_that_exists() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    paths += [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "pyproject.toml"]
    named: dict[str, set[str]] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for found in re.findall(r"(?:edgelm|install (?:-e )?'?\.)\[([a-z, -]+)\]", text):
            for extra in re.split(r",\s*", found):
                named.setdefault(extra, set()).add(path.name)
    assert {"llamacpp", "mlx", "structured", "hub", "profile", "serve", "llm", "langchain"} <= named.keys()
    assert not {extra: where for extra, where in named.items() if extra not in extras}


@pytest.mark.parametrize("path", ["edgelm", "backends", "models", "apps"])
def test_every_import_of_somebody_elses_is_declared(path: str) -> None:
    """A module is of the standard library, of this project, or of a package that an installation or an extra brings."""
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    declared = {re.split(r"[\[<>=;~! ]", one)[0].replace("-", "_").lower() for one in wanted}
    # what comes with one of these, or is called otherwise as a module
    declared |= {"llama_cpp", "huggingface_hub", "langchain_core", "markdown_it", "pydantic", "openvino", "yaml"} | {
        Path(package).name for package in PACKAGES
    }
    for file in (ROOT / path).rglob("*.py"):
        if file.is_relative_to(ROOT / "apps/mobile"):  # a project of its own
            continue
        tops = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                tops |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                tops.add((node.module or "").partition(".")[0])
        unknown = {top for top in tops if top.lower() not in declared} - sys.stdlib_module_names
        assert not unknown, f"{file.relative_to(ROOT)} imports {unknown}"
