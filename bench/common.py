"""What the benchmarks share: models, what this machine is, children that measure, tables and JSON.

Knows no figure of its own. Every script runs both sides of a ratio in turn within one run and reports medians.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results"
MODELS = ("smollm2-135m-instruct", "gemma-3-270m")
CONTEXTS = {"smollm2-135m-instruct": 1024, "gemma-3-270m": 2048}
MB = 1_000_000
PACKAGES = ("edgelm", "numpy", "llama-cpp-python", "onnxruntime", "onnxruntime-genai")
COMMAND = "import sys; from edgelm_apps.cli import main; sys.exit(main())"
"""What the installed `edgelm` script does."""


# -- models and prompts --------------------------------------------------------------------------------


def find_model(name: str) -> Path:
    """Return the file of a path, or of a catalogue name (in `EDGELM_TEST_MODELS` or pulled before)."""
    if Path(name).is_file():
        return Path(name).resolve()
    from edgelm_models.cache import find
    from edgelm_models.catalogue import CATALOGUE

    folder = os.environ.get("EDGELM_TEST_MODELS")
    if folder and name in CATALOGUE:
        candidate = Path(folder) / CATALOGUE[name].file_name
        if candidate.is_file():
            return candidate.resolve()
    cached = find(name)
    if cached is None:
        sys.exit(f"{name} is not on this machine: run `edgelm pull {name}` first")
    return cached.path


def scratch_folder() -> Path:
    """Return the folder for large files that a benchmark makes."""
    from edgelm_models.cache import cache_dir

    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def text_of(model: Path, n_tokens: int, start: str = "") -> str:
    """Return prose that `model` reads as exactly `n_tokens`; another `start` gives a text that shares no prefix."""
    from edgelm.files.gguf import open_model
    from edgelm.text.tokenizer import load_tokenizer

    encode = load_tokenizer(open_model(str(model))).encode
    words = (start + (HERE / "prompt.txt").read_text()).split(" ")
    words *= 1 + n_tokens // len(words)
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encode(" ".join(words[:middle]))) <= n_tokens else (low, middle - 1)
    text = " ".join(words[:low])
    while len(encode(text)) < n_tokens:
        text += " a"
    assert len(encode(text)) == n_tokens, f"no text of exactly {n_tokens} tokens was found"
    return text


def prose() -> str:
    """Return some three thousand words of different kinds: a story, articles, programs, questions."""
    texts = [(HERE / "prompt.txt").read_text()]
    for name in ("summarise", "edit", "chat", "story", "list"):
        lines = (HERE / "prompts" / f"{name}.jsonl").read_text().splitlines()
        texts += [json.loads(line)["user"] for line in lines]
    return "\n\n".join(texts)


# -- this machine --------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what a figure needs to be understood: device, system, versions, commit."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['usable_cores']} cores, {facts['memory_bytes'] / 1e9:.1f} GB, {facts['system']}, "
        f"Python {facts['python']}, {versions}, commit {facts['commit']}, {facts['date']}"
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed" if name != "edgelm" else "source tree"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD")
    # results written by an earlier script of the same session are not a change of what is measured
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return (commit or "unknown") + ("+changes" if dirty else "")


# -- children ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finished:
    """A child that ended. `peak_bytes` is its largest resident size, told by the kernel when it was waited for."""

    exit_code: int
    stdout: str
    stderr: str
    wall_s: float
    peak_bytes: int

    def json(self) -> Any:
        if self.exit_code != 0:
            raise RuntimeError(f"exit code {self.exit_code}: {self.stderr.strip()[-600:]}")
        return json.loads(self.stdout)


def run(argv: Sequence[str]) -> Finished:
    """Run a child to its end; a failing one does not raise."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        began = time.perf_counter()
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        _, status, usage = os.wait4(child.pid, 0)
        wall_s = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        scale = 1 if sys.platform == "darwin" else 1024
        return Finished(child.returncode, out.read(), err.read(), wall_s, usage.ru_maxrss * scale)


def answer_of_child(script: str, spec: Mapping[str, Any]) -> Any:
    """Return what `script` says of `spec` in a process of its own; see `main_or_child`."""
    return run([sys.executable, script, "--child", json.dumps(spec)]).json()


def main_or_child(main: Callable[[], None], child: Callable[[Any], Any]) -> None:
    """Run a script: as the child that `answer_of_child` starts, or as it was called."""
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
    else:
        main()


def edgelm_run(
    model: Path,
    prompt: str,
    *,
    max_tokens: int,
    threads: int,
    context: int,
    memory_bytes: int | None = None,
    backend: str | None = None,
    as_json: bool = True,
) -> list[str]:
    """Return the command line of one `edgelm run` that is measured."""
    argv = [sys.executable, "-c", COMMAND, "run", str(model), prompt, "--raw", "--ignore-eos"]
    argv += ["--max-tokens", str(max_tokens), "--threads", str(threads), "--context", str(context), "--quiet"]
    argv += ["--memory", str(memory_bytes)] if memory_bytes else []
    argv += ["--backend", backend] if backend else []
    return argv + ["--json"] * as_json


def side(name: str, **spec: Any) -> list[str]:
    """Return the command line of `ours.py` or `peer.py`, which measure inside one process."""
    return [sys.executable, str(HERE / f"{name}.py"), json.dumps(spec, default=str)]


# -- reports -------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """What a script found: tables for people, JSON for programs."""

    name: str
    conditions: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=machine)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, table: str, **row: Any) -> None:
        """Add a row and say it on stderr, for whoever waits."""
        self.rows.setdefault(table, []).append(row)
        print(
            f"{table}: { {key: value for key, value in row.items() if not isinstance(value, list)} }", file=sys.stderr
        )

    def markdown(self) -> str:
        said = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        parts = [f"## {self.name}", f"{machine_line(self.machine)}. {said}."]
        for title, rows in self.rows.items():
            parts += [f"### {title}", _table(rows)]
        return "\n\n".join(parts)

    def finish(self) -> None:
        """Print the tables and write `results/<name>.json`."""
        RESULTS.mkdir(exist_ok=True)
        content = {key: getattr(self, key) for key in ("name", "conditions", "machine", "rows")}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
        print(self.markdown())


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if not isinstance(row[key], list | dict)))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def mb(n_bytes: float) -> float:
    return round(n_bytes / MB, 2)


def middle(values: Iterable[float]) -> float:
    return float(median(values))


def arguments(doc: str | None, *, rounds: int, models: Sequence[str] = MODELS) -> argparse.ArgumentParser:
    """Return the parser that every script begins with."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(models), help="catalogue names or paths")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, default=rounds, help="times each side has its turn")
    return parser
