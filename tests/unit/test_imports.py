"""The house keeps its order: who imports whom, what `import edgelm` costs, what is public, how large things grow."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgelm
from edgelm.engine import registry

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "edgelm": ROOT / "edgelm",
    "edgelm_numpy": ROOT / "backends/edgelm_numpy",
    "edgelm_llamacpp": ROOT / "backends/edgelm_llamacpp",
    "edgelm_mlx": ROOT / "backends/edgelm_mlx",
    "edgelm_onnx": ROOT / "backends/edgelm_onnx",
    "edgelm_npu": ROOT / "backends/edgelm_npu",
    "edgelm_models": ROOT / "models/edgelm_models",
    "edgelm_apps": ROOT / "apps/edgelm_apps",
    "edgelm_examples": ROOT / "apps/edgelm_examples",
}
BASE = {
    "edgelm.cachedir", "edgelm.errors", "edgelm.hashing", "edgelm.sequences", "edgelm.simulated", "edgelm.sizes",
}  # fmt: skip
RANKS = {
    "edgelm.files": 1,
    "edgelm.text": 1,
    "edgelm.memory": 2,
    "edgelm.engine": 3,
    "edgelm.testing": 5,
    "edgelm.parity": 6,
}
BASE_RANK, TOP_RANK = 0, 4
ARCHITECTURE_MAY = {
    "edgelm.errors", "edgelm.engine.architecture", "edgelm.engine.backend", "edgelm.engine.ir", "edgelm.engine.ops",
    "edgelm.engine.translation", "edgelm_models.parts", "edgelm_models.configs",
}  # fmt: skip
SHARED_BY_ARCHITECTURES = {"edgelm_models.parts", "edgelm_models.configs"}
BACKEND_MAY = {
    "edgelm.errors", "edgelm.sizes", "edgelm.engine.backend", "edgelm.engine.ir", "edgelm.engine.rope",
    "edgelm.engine.arrays", "edgelm.engine.lanes",
    "edgelm.files.blocks", "edgelm.files.quantize", "edgelm.memory.cache_layout",
    "edgelm.files.ggml_types", "edgelm.files.model", "edgelm.files.affine", "edgelm.files.graph",
}  # fmt: skip
APPS_MAY = {"edgelm", "edgelm.aio", "edgelm.errors", "edgelm.sequences", "edgelm.sizes"}
CATALOGUE_MAY = BASE | {
    "edgelm.files", "edgelm.files.drafts", "edgelm.files.folder", "edgelm.files.gguf", "edgelm.files.kept",
    "edgelm.files.prepared", "edgelm.text.cache",
}  # fmt: skip

MODULE_LINES = 400
FOLDER_LINES = {  # raised only on purpose
    "edgelm": 4160,  # forms, drafts, scores, guesses that are kept, approximate attention, published figures
    "edgelm/files": 3800,
    "edgelm/text": 3200,  # every family calls tools in its own way
    "edgelm/memory": 5000,
    "edgelm/engine": 8650,  # speculation has drafters, a controller and a planner
    "edgelm/testing": 2800,
    "edgelm/parity": 1100,
    "backends/edgelm_numpy": 1200,
    "backends/edgelm_llamacpp": 1200,
    "backends/edgelm_onnx": 3300,  # kernels are found in memory, and every operator is written out
    "backends/edgelm_mlx": 1200,
    "backends/edgelm_npu": 1400,
    "models/edgelm_models": 2100,
    "apps/edgelm_apps": 10300,  # a server of three APIs, plug-ins for two programs, a screen, a demo for boards
    "apps/edgelm_examples": 800,
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()
IMPORTS = {}


def imports(name: str) -> set[str]:
    """Return the modules of this project that a module imports when it runs, inside functions too."""
    if name not in IMPORTS:
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        IMPORTS[name] = {target for node in runtime_nodes(tree) for target in targets(node)}
    return IMPORTS[name]


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk the tree without what only type checkers see."""
    yield node
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        children = node.orelse
    for child in children:
        yield from runtime_nodes(child)


def targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in SOURCES)
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        module = node.module or ""
        if module.partition(".")[0] in SOURCES:
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else module for name in submodules)


def layer(name: str) -> tuple[str, int]:
    """Return the layer of a module of the core, and how high it lies."""
    package = ".".join(name.split(".")[:2])
    if package in BASE:
        return "base", BASE_RANK
    return (package, RANKS[package]) if package in RANKS else ("top", TOP_RANK)


def wrong(name: str, allowed: set[str], own: str = "") -> list[str]:
    return sorted(
        target
        for target in imports(name)
        if target not in allowed and not (own and (target == own or target.startswith(own + ".")))
    )


@pytest.mark.parametrize("name", [name for name in MODULES if name.partition(".")[0] == "edgelm"])
def test_the_core_imports_downwards(name: str) -> None:
    mine, rank = layer(name)
    for target in imports(name):
        if mine == "edgelm.testing":
            continue
        assert target.partition(".")[0] == "edgelm", f"the core knows no {target}"
        theirs, below = layer(target)
        assert theirs == mine or below < rank, f"{name} ({mine}) imports {target} ({theirs})"


@pytest.mark.parametrize("architecture", sorted(registry.ARCHITECTURES))
def test_architectures_know_the_contract_only(architecture: str) -> None:
    assert not wrong(registry.ARCHITECTURES[architecture], ARCHITECTURE_MAY)


@pytest.mark.parametrize("name", sorted(SHARED_BY_ARCHITECTURES))
def test_the_parts_that_architectures_share_know_no_more(name: str) -> None:
    assert not wrong(name, ARCHITECTURE_MAY | {"edgelm.files.ggml_types"})


@pytest.mark.parametrize("package", ["edgelm_numpy", "edgelm_llamacpp", "edgelm_mlx", "edgelm_onnx"])
def test_backends_know_the_contract_only(package: str) -> None:
    for name in MODULES:
        if name.partition(".")[0] == package:
            assert not wrong(name, BACKEND_MAY, own=package), name


def test_the_npu_knows_the_backend_that_computes_beside_it() -> None:
    beside = {name for name in MODULES if name.partition(".")[0] == "edgelm_numpy"}
    for name in MODULES:
        if name.partition(".")[0] == "edgelm_npu":
            assert not wrong(name, BACKEND_MAY | beside, own="edgelm_npu"), name


def test_catalogue_and_cache_know_no_engine() -> None:
    architectures = {*registry.ARCHITECTURES.values(), *SHARED_BY_ARCHITECTURES}
    for name in MODULES:
        if name.partition(".")[0] == "edgelm_models" and name not in architectures:
            assert not wrong(name, CATALOGUE_MAY, own="edgelm_models"), name


def test_apps_know_the_public_names_only() -> None:
    for name in MODULES:
        if name.partition(".")[0] == "edgelm_apps":
            allowed = APPS_MAY | {target for target in MODULES if target.startswith("edgelm_models")}
            assert not wrong(name, allowed, own="edgelm_apps"), name


def test_examples_know_what_a_stranger_knows() -> None:
    for name in MODULES:
        if name.partition(".")[0] == "edgelm_examples":
            assert imports(name) <= {"edgelm", "edgelm.errors"}, name


def test_importing_edgelm_loads_the_standard_library_and_numpy_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import edgelm; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) - sys.stdlib_module_names
    assert loaded <= {"edgelm", "numpy"}


@pytest.mark.parametrize("package", ["edgelm_numpy", "edgelm_llamacpp", "edgelm_mlx", "edgelm_npu", "edgelm_onnx"])
def test_importing_a_backend_does_not_import_its_library(package: str) -> None:
    code = f"import sys, {package}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"llama_cpp", "mlx", "onnxruntime", "click", "tqdm", "tokenizers", "jinja2"} & set(done.stdout.split())


def test_all_is_the_documented_surface() -> None:
    page = (ROOT / "docs/quickstart.md").read_text(encoding="utf-8")
    section = page.partition("## Every public name")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    documented = [name for row in rows for name in re.findall(r"`edgelm\.(\w+)", row.split("|")[1])]
    assert sorted(documented) == sorted(edgelm.__all__)
    assert len(set(documented)) == len(documented)


def test_every_public_name_exists_and_is_documented() -> None:
    for name in edgelm.__all__:
        assert getattr(edgelm, name).__doc__, name


@pytest.mark.parametrize("group", ["backends", "architectures"])
def test_built_ins_come_through_the_door_of_strangers(group: str) -> None:
    """Entry points in pyproject.toml equal the table that stands in for them in frozen applications."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    table = {"backends": registry.BACKENDS, "architectures": registry.ARCHITECTURES}[group]
    assert project["entry-points"][f"edgelm.{group}"] == dict(table)


@pytest.mark.parametrize("name", MODULES)
def test_modules_stay_small(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MODULE_LINES


@pytest.mark.parametrize("folder", FOLDER_LINES)
def test_folders_stay_small(folder: str) -> None:
    paths = (ROOT / folder).glob("*.py") if folder == "edgelm" else (ROOT / folder).rglob("*.py")
    n_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
    assert n_lines <= FOLDER_LINES[folder]
