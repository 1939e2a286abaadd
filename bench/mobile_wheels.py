"""Which of edgelm's dependencies have wheels for Android and iOS on the package index, asked through pip's own client.

For each requirement, platform tag and version of Python: `pip download --only-binary :all: --no-deps`, into a folder
that is thrown away. Says nothing of indexes of other people's builds, and nothing of whether a wheel works on a device.
Writes `bench/results/mobile_wheels.json`; `docs/embedding.md` shows it as a table. Needs pip 25.1 or newer, which knows
these tags, and takes some minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench/results/mobile_wheels.json"
PLATFORMS = {"Android": "android_24_arm64_v8a", "iOS": "ios_13_0_arm64_iphoneos"}
PYTHONS = ("3.13", "3.14")
EXTRAS = ("llamacpp", "mlx", "structured", "serve")
BESIDE = ("markupsafe", "tokenizers")
"""Compiled, too: what Jinja needs, and what reads tokenizers of Hugging Face that edgelm does not know."""


def requirements() -> list[str]:
    """Return the names of everything that pyproject.toml asks for at run time, and of what is compiled below it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(one for extra in EXTRAS for one in extras[extra]), *BESIDE]
    names = (re.match(r"[A-Za-z0-9_.-]+", one) for one in wanted)
    return list(dict.fromkeys(name[0].lower() for name in names if name))


def wheel(name: str, platform: str, python: str) -> str | None:
    """Return the name of the wheel that pip finds, None if there is none. Raises where pip fails in another way."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
            "--platform", platform, "--python-version", python, "--implementation", "cp", "--dest", folder, name,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = [path.name for path in Path(folder).glob("*.whl")]
        if found:
            return found[0]
        if f"No matching distribution found for {name}" in done.stderr:
            return None
        raise RuntimeError(f"pip failed for {name} on {platform}: {done.stderr}")


def newest(name: str) -> str | None:
    """Return the newest version for this machine's own Python, None if there is none."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", name], capture_output=True, text=True, check=False
    )
    found = re.match(rf"{re.escape(name)} \((\S+)\)", done.stdout, re.IGNORECASE)
    return found[1] if found else None


def cell(row: dict[str, Any], system: str) -> str:
    """Say in a word or two what there is for a system."""
    found = set(row[system].values())
    if None in found:
        return "no"
    version = {name.split("-")[1] for name in found}
    if version != {row["newest_here"]}:
        return f"no (only {', '.join(sorted(version))})"
    return "pure Python" if all(name.endswith("-none-any.whl") for name in found) else "yes"


def table(facts: dict[str, Any]) -> str:
    """Return the table of the documentation."""
    lines = [f"| package | newest version | {' | '.join(facts['platforms'])} |", "|---|---|" + "---|" * len(PLATFORMS)]
    for row in facts["packages"]:
        cells = " | ".join(cell(row, system) for system in facts["platforms"])
        lines.append(f"| {row['name']} | {row['newest_here']} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    rows: list[dict[str, Any]] = []
    for name in requirements():
        row: dict[str, Any] = {"name": name, "newest_here": newest(name)}
        for system, platform in PLATFORMS.items():
            row[system] = {python: wheel(name, platform, python) for python in PYTHONS}
        rows.append(row)
        print(f"{name:20} " + "  ".join(str(row[system][PYTHONS[-1]]) for system in PLATFORMS), flush=True)
    facts = {"date": date.today().isoformat(), "platforms": PLATFORMS, "pythons": PYTHONS, "packages": rows}
    RESULT.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(table(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
