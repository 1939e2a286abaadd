"""An application with edgelm inside, frozen by PyInstaller, computes what the same application computes unfrozen."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgelm
from edgelm._pyinstaller import hook_dirs

ROOT = Path(__file__).resolve().parents[2]
APPLICATION = """
import sys

import edgelm

if __name__ == "__main__":
    with edgelm.load(sys.argv[1], memory="300MB", backend=sys.argv[2], context=128) as model:
        print(ascii(model.chat().send("the cat", max_tokens=12)))
"""


def test_pyinstaller_finds_the_hooks_by_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pyinstaller40"] == {"hook-dirs": "edgelm._pyinstaller:hook_dirs"}
    assert [path.name for folder in hook_dirs() for path in Path(folder).glob("hook-*.py")] == ["hook-edgelm.py"]


@pytest.mark.slow
def test_a_frozen_application_answers(tmp_path: Path, tiny: Path) -> None:
    """With one backend besides NumPy, if that is installed; what was not brought along is a sentence."""
    pytest.importorskip("PyInstaller", reason="PyInstaller is not installed: pip install '.[test]'")
    (tmp_path / "app.py").write_text(APPLICATION)
    works = [report.name for report in edgelm.backends() if report.available and report.name in ("llamacpp", "onnx")]
    brought = ["numpy", *works[:1]]
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "ERROR", "app.py"]
    hooks = [argument for folder in hook_dirs() for argument in ("--additional-hooks-dir", folder)]
    environment = {
        **os.environ,
        "EDGELM_FREEZE": ",".join(brought),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run([*command, *hooks], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(backend: str) -> subprocess.CompletedProcess[str]:
        command = [str(tmp_path / "dist/app/app"), str(tiny), backend]
        return subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, timeout=60)

    for backend in (*brought, "auto"):
        with edgelm.load(
            tiny, memory="2GB", backend=brought[-1] if backend == "auto" else backend, context=128
        ) as model:
            expected = ascii(model.chat().send("the cat", max_tokens=12))
        answered = run(backend)
        assert answered.stdout.strip() == expected, answered.stderr
    missing = run("mlx")
    assert "backend 'mlx' is not available: No module named 'edgelm_mlx'" in missing.stderr
