"""What can be said about aarch64 (64-bit Raspberry Pi OS) without a board: wheels, and edgelm in an emulator.

Wheels: pip resolves every requirement for aarch64 and the Pythons of Raspberry Pi OS, from wheels alone. Runs: an
aarch64 Python of Debian with these wheels runs edgelm under QEMU's user-mode emulation, with the instructions of a Pi 4
(Cortex-A72) and a Pi 5 (Cortex-A76), and greedy tokens are compared with this machine's. Emulated seconds say nothing
about a board and are not reported. Needs Debian's mmdebstrap and a package index; nothing of it needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

SYSTEMS = {"Bookworm": ("311", 36), "Trixie": ("313", 41)}
"""Raspberry Pi OS: its Python, and its glibc 2.x, which says what wheels may ask for."""
PROCESSORS = {"Raspberry Pi 4": "cortex-a72", "Raspberry Pi 5": "cortex-a76"}
EXTRAS = ("llamacpp", "ggml", "mlx", "structured", "hub", "profile", "serve")
PROMPT = "The capital of France is"
TINY_TOKENS, MODEL_TOKENS = 16, 8
CHILD = """
import json, platform, sys
import edgelm
from edgelm.engine import health
health.TIMEOUT_S = 600.0  # an emulator takes its time
path, backend, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
known = {report.name: report for report in edgelm.backends()} if backend != "auto" else {}
answer = {"machine": platform.machine(), "python": platform.python_version()}
if known and not known[backend].available:
    answer["refused"] = known[backend].reason
else:
    with edgelm.load(path, backend=backend, memory="1GB", context=128, threads=1) as model:
        chunks = list(model.stream(sys.argv[4], max_tokens=n_tokens, ignore_eos=True))
        answer["ids"] = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
        answer["version"] = known[backend].version if known else model.backend
print(json.dumps(answer))
"""
MODULES = (".", "backends", "models", "apps")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"], help="catalogue names or paths")
    parser.add_argument("--threads", type=int, choices=[1], default=1, help="emulated threads")
    parser.add_argument("--only", choices=["wheels", "runs"], help="do half of it")
    args = parser.parse_args()
    report = common.Report("aarch64", {"threads": args.threads, "a real board": "no: wheels resolved, runs emulated"})
    if args.only != "runs":
        for row in wheels():
            report.add("Wheels for aarch64", **row)
    if args.only != "wheels":
        for row in runs([common.find_model(name) for name in args.models]):
            report.add("Runs under emulation", **row)
    report.finish()


# -- wheels --------------------------------------------------------------------------------------------


def wheels() -> Iterator[dict[str, Any]]:
    """Yield, for each system and each set of requirements, what pip would install."""
    for system, (python, glibc) in SYSTEMS.items():
        for extra in ("", *EXTRAS):
            found = resolve(requirements(extra), python, glibc)
            binary = [name for name in found["wheels"] if "aarch64" in name]
            yield {
                "system": f"{system}, Python 3.{python[1:]}",
                "requirements": f"edgelm[{extra}]" if extra else "edgelm",
                "from wheels": not found["problem"],
                "wheels": len(found["wheels"]),
                "of them for aarch64": len(binary),
                "why not": found["problem"],
                "every": found["wheels"],
            }


def requirements(extra: str) -> list[str]:
    """Return the requirements of a plain install, and of an extra beside them."""
    project = tomllib.loads((common.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else ())]


def resolve(wanted: Sequence[str], python: str, glibc: int) -> dict[str, Any]:
    """Let pip resolve requirements for aarch64 without installing anything; markers are those of this Linux."""
    with tempfile.NamedTemporaryFile(suffix=".json") as found:
        argv = [*pip_install(python, glibc), "--dry-run", "--target", "unused", "--report", found.name, *wanted]
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            problems = [line for line in done.stderr.splitlines() if line.startswith("ERROR: No matching")]
            return {"wheels": [], "problem": (problems or ["pip failed"])[-1].removeprefix("ERROR: ")}
        chosen = json.loads(Path(found.name).read_text())["install"]
        return {"wheels": sorted(one["download_info"]["url"].rpartition("/")[2] for one in chosen), "problem": ""}


def pip_install(python: str, glibc: int) -> list[str]:
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in range(17, glibc + 1))]
    argv = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--ignore-installed"]
    argv += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python]
    return [*argv, *(word for name in platforms for word in ("--platform", name))]


# -- runs ----------------------------------------------------------------------------------------------


def runs(models: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield, for each processor, file and backend, the tokens in the emulator beside those of this machine."""
    if shutil.which("mmdebstrap") is None:
        sys.exit("mmdebstrap is needed to fetch an aarch64 Python: apt-get install mmdebstrap")
    from edgelm.testing import tiny_genai, tiny_model

    folder = common.scratch_folder() / "aarch64"
    folder.mkdir(exist_ok=True)
    python = emulated_python(folder)
    tiny = tiny_model(folder / "tiny.gguf", "llama")
    graph = tiny_genai(folder / "tiny-genai")
    jobs = [(tiny, backend, TINY_TOKENS) for backend in ("numpy", "llamacpp", "onnx")]
    jobs += [(graph, "auto", TINY_TOKENS)]
    jobs += [(model, backend, MODEL_TOKENS) for model in models for backend in ("numpy", "llamacpp")]
    for board, cpu in PROCESSORS.items():
        for path, backend, n_tokens in jobs:
            argv = ["-c", CHILD, str(path), backend, str(n_tokens), PROMPT]
            there = answer([str(python), *argv], emulated_environment(folder, cpu))
            here = answer([sys.executable, *argv], own_environment(folder))
            yield {
                "instructions of": f"{board} ({cpu})",
                "model": path.name,
                "backend": "onnx (graph)" if backend == "auto" else backend,
                "there": there.get("version", ""),
                "here": here.get("version", ""),
                "runs": "ids" in there,
                "tokens equal": there["ids"] == here["ids"] if "ids" in there and "ids" in here else None,
                "why not": there.get("refused") or there.get("failed", ""),
                "python": there.get("python", ""),
                "ids there": there.get("ids", []),
                "ids here": here.get("ids", []),
            }


def answer(argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def emulated_python(folder: Path) -> Path:
    """Return a program of this machine that is an aarch64 Python: Debian's, with the wheels that edgelm needs.

    It starts itself as its children, which edgelm needs, without any help of the kernel.
    """
    root, tools, wheels_folder, program = (folder / name for name in ("root", "tools", "wheels", "python"))
    extract("bookworm", "arm64", "python3,libgomp1,libstdc++6", root)
    extract("trixie", common_arch(), "qemu-user", tools)  # the emulator of Bookworm crashes in ONNX Runtime
    if not wheels_folder.exists():
        wanted = requirements("ggml")
        subprocess.run([*pip_install(*SYSTEMS["Bookworm"]), "--target", str(wheels_folder), *wanted], check=True)
    emulator, interpreter = tools / "usr/bin/qemu-aarch64", root / "usr/bin/python3.11"
    program.write_text(f'#!/bin/sh\nexec {emulator} -L {root} -0 {program} {interpreter} "$@"\n')
    program.chmod(0o755)
    return program


def extract(suite: str, architecture: str, packages: str, root: Path) -> None:
    """Unpack packages of Debian, and what they need, into a folder; nothing of them is run."""
    if root.exists():
        return
    beside = root.with_name(root.name + ".new")
    argv = ["mmdebstrap", "--quiet", "--variant=extract", f"--architectures={architecture}", f"--include={packages}"]
    subprocess.run([*argv, suite, str(beside)], check=True)
    beside.rename(root)


def common_arch() -> str:
    return subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=True).stdout.strip()


def own_environment(folder: Path) -> dict[str, str]:
    paths = [str(common.ROOT / name) for name in MODULES]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def emulated_environment(folder: Path, cpu: str) -> dict[str, str]:
    own = own_environment(folder)
    return {
        **own,
        "PYTHONPATH": os.pathsep.join([str(folder / "wheels"), own["PYTHONPATH"]]),
        "PYTHONHOME": str(folder / "root/usr"),
        "EDGELM_CACHE": str(folder / f"cache-{cpu}"),
        "QEMU_CPU": cpu,
    }


if __name__ == "__main__":
    main()
